"""The stored form: modules that hold packed codes and qparams as buffers, and no Quantizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.kernels import ops
from qat.kernels.linear import compute_dtype
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.packing import pack, packed_bytes, unpack
from qat.numerics.qtensor import QParams, QuantizedTensor, codes_shape

# QParams fields in the order in which they are described, stored and loaded.
_FIELDS = QParams._fields


class PackedTensor(nn.Module):
    """A QuantizedTensor as buffers: bit-packed `codes`, and one buffer for each of its qparams.

    A scale that is quantized itself is a PackedTensor in turn, so its codes are stored under `scale.codes`.

    Args:
        description: what `describe` returns; the buffers are allocated from it and filled by `load_state_dict`.
    """

    codes: Tensor

    def __init__(self, description: dict[str, Any], device: torch.device | None = None) -> None:
        super().__init__()
        self.description = description
        self.format = parse_format(description["format"])
        self.granularity = parse_granularity(description["granularity"])
        self.shape = torch.Size(description["shape"])
        self.dtype = dtype_named(description["dtype"])
        size = packed_bytes(codes_shape(self.shape, self.format).numel(), self.format.bits)
        self.register_buffer("codes", torch.empty(size, dtype=torch.uint8, device=device))
        for name in _FIELDS:
            field = description.get(name)
            if field is None:
                continue
            if "format" in field:
                self.add_module(name, PackedTensor(field, device))
            else:
                buffer = torch.empty(field["shape"], dtype=dtype_named(field["dtype"]), device=device)
                self.register_buffer(name, buffer)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor) -> "PackedTensor":
        """Pack `q`."""
        packed = cls(describe(q), q.codes.device)
        packed.codes.copy_(pack(q.codes, q.format))
        for name, value in zip(_FIELDS, q.qparams, strict=True):
            if isinstance(value, QuantizedTensor):
                setattr(packed, name, cls.from_quantized(value))
            elif value is not None:
                getattr(packed, name).copy_(value)
        return packed

    def quantized(self) -> QuantizedTensor:
        """The QuantizedTensor, codes unpacked."""
        fields: list[Any] = [getattr(self, name, None) for name in _FIELDS]
        resolved: list[Any] = [f.quantized() if isinstance(f, PackedTensor) else f for f in fields]
        codes = unpack(self.codes, self.format, codes_shape(self.shape, self.format))
        return QuantizedTensor(codes, QParams(*resolved), self.format, self.granularity, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in `dtype` or the dtype of the tensor that was quantized."""
        q = self.quantized()
        return ops.dequantize(q.codes, q.qparams, q.format, q.granularity, dtype or self.dtype)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format.name}, {self.granularity}"


class PackedLinear(nn.Module):
    """y = output_quantizer(input_quantizer(x) @ dequantize(weight)^T + b), for inference.

    Computes in the dtype of x, or in autocast's; the same bits as the QuantLinear it came from wherever the matrix
    product is the same.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: PackedTensor,
        bias: Tensor | None = None,
        input_quantizer: nn.Module | None = None,
        output_quantizer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.input_quantizer = input_quantizer or nn.Identity()
        self.output_quantizer = output_quantizer or nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        return self.output_quantizer(F.linear(x, self.weight.dequantize(compute_dtype(x)), self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def describe(q: QuantizedTensor) -> dict[str, Any]:
    """Everything but the numbers: what an artifact's JSON says of `q`, and what `PackedTensor` is built from."""
    description: dict[str, Any] = {
        "format": q.format.name,
        "granularity": str(q.granularity),
        "shape": list(q.shape),
        "dtype": dtype_name(q.dtype),
    }
    for name, value in zip(_FIELDS, q.qparams, strict=True):
        if isinstance(value, QuantizedTensor):
            description[name] = describe(value)
        elif value is not None:
            description[name] = {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}
    return description


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as artifacts spell it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that artifacts spell `name`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"'{name}' is not a dtype of torch.")
    return dtype
