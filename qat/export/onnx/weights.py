"""A quantized weight as a DequantizeLinear node, and back.

Weights are stored as `[in, out]`, as MatMul takes its right operand, and as the kernels of ONNX Runtime that multiply
codes want them. Scales are then of shape `[]`, `[out]` (axis 1) or `[in / block_size, out]` (axis 0), zero points too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit, group_misfits
from qat.export.onnx.stored import stored_codes
from qat.export.onnx.tensors import (
    ONNX_DTYPES,
    constant_of,
    numbers_to_onnx,
    numbers_to_torch,
    to_torch,
    values_to_onnx,
)
from qat.nn import PackedTensor
from qat.nn.packed import describe, dtype_named
from qat.numerics.formats import CodebookFormat, FloatFormat, Format, parse_format
from qat.numerics.granularity import Granularity, PerBlock, PerTensor, parse_granularity
from qat.numerics.qtensor import QParams, QuantizedTensor, codes_shape

StoredTensor = Callable[[str], ir.TensorProtocol]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_misfits(grid: WeightGrid, opset: int) -> Iterator[Misfit]:
    """Everything that keeps a weight of this grid from being a DequantizeLinear node."""
    if stored_codes(grid.format, opset) is None:
        yield Misfit(f"{grid.format.name} codes", _nearest(grid.format))
    if isinstance(grid.scale, WeightGrid):
        yield Misfit("scales that are quantized themselves", "scheme.weight.double_quant=false")
    if grid.offset:
        yield Misfit("offsets", "quantizer@scheme.weight=lsq")
    if grid.group_size is None and not isinstance(grid.granularity, PerTensor | PerBlock):
        columns = grid.shape[-1]
        yield from group_misfits(grid, [-1, *(size for size in (32, 64, 128) if columns % size == 0)])
    if grid.dtype not in _DTYPES:
        yield Misfit(f"values in {str(grid.dtype).removeprefix('torch.')}", "model.dtype=float32")


def _nearest(format: Format) -> str:
    """The options of the nearest grid that ONNX has a type for."""
    if isinstance(format, FloatFormat) and format.bits > 4:
        return "quantizer@scheme.weight=fp8 scheme.weight.bits=8"
    if isinstance(format, CodebookFormat) and format.entries == 3:
        return "quantizer@scheme.weight=ternary_lsq"
    return f"quantizer@scheme.weight=lsq scheme.weight.bits={max(2, format.bits // format.block)}"


def weight_nodes(name: str, weight: PackedTensor, opset: int) -> list[ir.Node]:
    """The nodes whose last one gives the weight called `name` as `[in, out]`; it names their constants."""
    q = weight.without_codes()
    stored = stored_codes(q.format, opset)
    assert stored is not None  # or the weight was refused
    own, zero_point = q.qparams.scale, q.qparams.zero_point
    assert isinstance(own, Tensor)
    rows, columns = q.shape
    # In this dtype the one product of a value, exact before it is rounded once, is the one that we take.
    dtype = q.dtype if own.dtype == q.dtype and stored.factor == 1 else torch.float32

    def codes() -> Tensor:
        return stored.numbers(weight.quantized().codes).t()

    def scale() -> Tensor:
        return _laid_out(own.to(dtype), q.granularity, rows) / stored.factor

    def zero() -> Tensor:
        assert zero_point is not None
        return stored.numbers(_laid_out(zero_point, q.granularity, rows))

    shape = _laid_out(own.to("meta"), q.granularity, rows).shape
    inputs = [
        numbers_to_onnx(codes, stored.dtype, (columns, rows), f"{name}.codes"),
        values_to_onnx(scale, dtype, shape, f"{name}.scale"),
    ]
    if zero_point is not None:
        inputs.append(numbers_to_onnx(zero, stored.dtype, shape, f"{name}.zero_point"))
    nodes = [ir.node("DequantizeLinear", [constant_of(t) for t in inputs], _attributes(shape, columns))]
    if dtype != q.dtype:
        nodes.append(ir.node("Cast", nodes[0].outputs, {"to": ONNX_DTYPES[q.dtype].value}))
    return nodes


def read_weight(name: str, stored_tensor: StoredTensor, described: Any, opset: int) -> QuantizedTensor:
    """The inverse of `weight_nodes`.

    Args:
        stored_tensor: gives each by its name.
        described: what `describe` said of the weight.

    Raises:
        InputError: if they are not what it says.
    """
    format, granularity = parse_format(described["format"]), parse_granularity(described["granularity"])
    stored, shape = stored_codes(format, opset), torch.Size(described["shape"])
    if stored is None:
        raise InputError(f"{name} has {format.name} codes, which no type of ONNX holds: the file is damaged.")
    codes = _tensor(f"{name}.codes", stored_tensor, stored.dtype, shape[::-1])
    dtype = dtype_named(described["scale"]["dtype"])
    scale = _back(f"{name}.scale", _floats(f"{name}.scale", stored_tensor) * stored.factor, granularity, shape)
    zero_point = None
    if "zero_point" in described:
        numbers = _tensor(f"{name}.zero_point", stored_tensor, stored.dtype, None)
        zero_point = _back(f"{name}.zero_point", numbers, granularity, shape)
    qparams = QParams(_exactly(f"{name}.scale", scale, dtype), zero_point)
    found = stored.codes(codes.t().contiguous(), format)
    if found.shape != codes_shape(shape, format) or not _within(found, format.code_range):
        raise InputError(f"{name} has codes that {format.name} has not: the file is damaged.")
    q = QuantizedTensor(found, qparams, format, granularity, dtype_named(described["dtype"]))
    if describe(q) != described:
        raise InputError(f"{name} is not what the file says of it: the file is damaged.")
    return q


def _within(codes: Tensor, range: tuple[int, int]) -> bool:
    return range[0] <= int(codes.min()) and int(codes.max()) <= range[1]


def _attributes(scales: torch.Size, columns: int) -> dict[str, int]:
    if not scales:
        return {}
    return {"axis": 1} if len(scales) == 1 else {"axis": 0, "block_size": columns // scales[0]}


def _laid_out(field: Tensor, granularity: Granularity, rows: int) -> Tensor:
    """Scales or zero points as DequantizeLinear takes them; tiles of several rows repeat theirs for each."""
    if isinstance(granularity, PerTensor):
        return field.reshape(())
    if isinstance(granularity, PerBlock):
        field = field.repeat_interleave(granularity.rows, 0)
    groups = field.reshape(rows, -1).t().contiguous()
    return groups[0] if len(groups) == 1 else groups


def _back(name: str, found: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """The inverse of `_laid_out` for a weight of `shape`."""
    try:
        groups = found.reshape(-1, 1 if isinstance(granularity, PerTensor) else shape[0]).t()
        rows = groups[:: granularity.rows] if isinstance(granularity, PerBlock) else groups
        field = rows.reshape(granularity.param_shape(shape)).contiguous()
        same = torch.equal(_laid_out(field, granularity, shape[0]), found)
    except RuntimeError as error:
        raise InputError(f"{name} is {list(found.shape)}, which does not fit scales {granularity}.") from error
    if not same:
        raise InputError(f"{name} differs within tiles that share it: the file is damaged.")
    return field


def _tensor(name: str, stored_tensor: StoredTensor, dtype: ir.DataType, shape: torch.Size | None) -> Tensor:
    """The bit patterns of the tensor `name`, which must be of this type and shape."""
    found = stored_tensor(name)
    sizes = tuple(found.shape.numpy())
    if found.dtype != dtype or (shape is not None and sizes != tuple(shape)):
        wanted = "" if shape is None else f" {list(shape)}"
        raise InputError(f"{name} is {found.dtype.name} {list(sizes)}, and should be {dtype.name}{wanted}.")
    return numbers_to_torch(found)


def _floats(name: str, stored_tensor: StoredTensor) -> Tensor:
    found = stored_tensor(name)
    if found.dtype not in [ONNX_DTYPES[dtype] for dtype in _DTYPES]:
        raise InputError(f"{name} is {found.dtype.name}, and should be a float.")
    return to_torch(found).to(torch.float32)


def _exactly(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, which must hold them."""
    stored = values.to(dtype)
    if not torch.equal(stored.to(values.dtype), values):
        raise InputError(f"{name} holds values that {dtype} does not, and should: the file is damaged.")
    return stored
