"""Tensors of torch as tensors of ONNX, and back, by their bytes."""

from collections.abc import Callable, Sequence

import numpy
import onnx_ir as ir
import torch
from torch import Tensor

from qat.numerics.formats import IntFormat
from qat.numerics.packing import pack, unpack

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}
ONNX_DTYPES = {dtype: onnx for onnx, dtype in TORCH_DTYPES.items()}


def to_onnx(tensor: Tensor, name: str) -> ir.Tensor:
    """`tensor`, of one of `TORCH_DTYPES`."""
    dtype = ONNX_DTYPES[tensor.dtype]
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return ir.Tensor(raw.view(dtype.numpy()).reshape(tuple(tensor.shape)), dtype=dtype, name=name)


def values_to_onnx(values: Callable[[], Tensor], dtype: torch.dtype, shape: Sequence[int], name: str) -> ir.LazyTensor:
    """As `to_onnx`, of what `values()` gives when it is written."""
    return ir.LazyTensor(lambda: to_onnx(values(), name), ONNX_DTYPES[dtype], ir.Shape(shape), name=name)


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The inverse of `to_onnx`."""
    flat = torch.frombuffer(bytearray(tensor.tobytes()), dtype=TORCH_DTYPES[tensor.dtype])
    return flat.reshape(tuple(tensor.shape.numpy()))


def numbers_to_onnx(
    numbers: Callable[[], Tensor], dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.LazyTensor:
    """A tensor of at most 8 bits a number, whose bit patterns `numbers()`, uint8, are asked for when they are written.

    ONNX packs the first of the numbers that share a byte into its lowest bits.
    """

    def tensor() -> ir.TensorProtocol:
        found = numbers().cpu().contiguous()
        if dtype.bitwidth == 8:
            return ir.Tensor(found.numpy().view(dtype.numpy()), dtype=dtype, name=name)
        count = -(-found.numel() * dtype.bitwidth // 8)
        packed: numpy.ndarray = pack(found, IntFormat(dtype.bitwidth, signed=False))[:count].numpy()
        return ir.PackedTensor(packed, dtype, shape=shape, name=name)

    return ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name)


def numbers_to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The inverse of `numbers_to_onnx`: uint8."""
    shape, bits = tuple(tensor.shape.numpy()), tensor.dtype.bitwidth
    flat = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
    if bits == 8:
        return flat.reshape(shape)
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % bits))
    return unpack(whole, IntFormat(bits, signed=False), shape)


def constant_of(tensor: ir.TensorProtocol) -> ir.Value:
    """The value of a graph that `tensor` is, called as it is."""
    shape = ir.Shape(list(tensor.shape.numpy()))
    return ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
