"""Quantized activations: static ones become QuantizeLinear and DequantizeLinear, dynamic ones our arithmetic.

QuantizeLinear rounds x / scale and adds the zero point; here the zero point is added first, and ties to even then fall
on other sides. So where there is one, x / scale + zero_point is computed before, and QuantizeLinear, with a scale of
one, only rounds. Dynamic scales are no constants, which TensorRT demands of QuantizeLinear: what finds and uses them is
traced from the definitions in `qat.numerics`, node for node.
"""

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qat.export.grids import ActivationGrid
from qat.export.layouts.base import Misfit
from qat.export.onnx.stored import OLDEST_OPSET, stored_codes
from qat.export.onnx.tensors import constant_of, numbers_to_onnx, to_onnx
from qat.nn import StoredActivation
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import FloatFormat, Format, IntFormat
from qat.numerics.granularity import PerGroup, PerTensor, PerToken
from qat.numerics.qtensor import scale_down, unscale

ACTIVATION = "qat::Activation"
_RULES = ("absmax", "minmax")
_WIDTHS = (4, 8)


def activation_misfits(role: str, grid: ActivationGrid) -> Iterator[Misfit]:
    """Everything that keeps an activation of this grid from being written.

    Args:
        role: input or output.
    """
    yield from _static_misfits(role, grid) if grid.rule is None else _dynamic_misfits(role, grid)


def _static_misfits(role: str, grid: ActivationGrid) -> Iterator[Misfit]:
    if _number(grid.format) is None:
        yield Misfit(f"a static {role} of {grid.format.name} codes", f"quantizer@scheme.{role}=minmax_static")
    if not isinstance(grid.granularity, PerTensor):
        yield Misfit(f"a static {role} with scales {grid.granularity}", f"scheme.{role}.granularity=per_tensor")


def _dynamic_misfits(role: str, grid: ActivationGrid) -> Iterator[Misfit]:
    if not (isinstance(grid.format, IntFormat) or _number(grid.format)):
        yield Misfit(f"a {role} of {grid.format.name} codes", f"quantizer@scheme.{role}=fp8_token")
    if grid.rule not in _RULES:
        yield Misfit(f"scales of the {role} by {grid.rule}", f"quantizer@scheme.{role}=minmax_token")
    if not isinstance(grid.granularity, PerToken | PerTensor | PerGroup):
        yield Misfit(f"a {role} with scales {grid.granularity}", f"scheme.{role}.granularity=per_token")


def _number(format: Format) -> ir.DataType | None:
    """The type that QuantizeLinear gives for `format`; its integers end where the type does."""
    if not isinstance(format, FloatFormat) and not (isinstance(format, IntFormat) and format.bits in _WIDTHS):
        return None
    stored = stored_codes(format, OLDEST_OPSET)
    return None if stored is None else stored.dtype


class StaticActivation(nn.Module):
    """Stands for a static `StoredActivation` while a model is traced.

    Args:
        name: its name, by which `static_nodes` finds it afterwards.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        said: dict[str, Any] = {"quantizer": self.name}
        found = torch.onnx.ops.symbolic(ACTIVATION, [wide], said, dtype=wide.dtype, shape=wide.shape, version=1)
        return found.to(x.dtype)


class DynamicActivation(nn.Module):
    """A dynamic `StoredActivation` in operators that ONNX has, the same to the bit."""

    def __init__(self, stored: StoredActivation) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, x: Tensor) -> Tensor:
        stored = self.stored
        assert stored.rule is not None
        view = stored.granularity.view(x.to(torch.float32))
        params = DYNAMIC_RULES[stored.rule](view, stored.format, stored.scale_dtype)
        v = scale_down(view, params).clamp(*stored.format.range())
        v_hat = v.to(stored.format.native).to(v.dtype) if isinstance(stored.format, FloatFormat) else v.round()
        return stored.granularity.unview(unscale(v_hat, params), x.shape).to(x.dtype)


def static_nodes(name: str, stored: StoredActivation, x: ir.Value) -> list[ir.Node]:
    """The nodes whose last one gives `stored` of the float32 `x`; `name`, its own, names their constants."""
    own, zero_point = stored.qparams(torch.empty(0))[:2]
    dtype = _number(stored.format)
    assert isinstance(own, Tensor)
    assert dtype is not None  # or the activation was refused
    scale = _scalar(own, f"{name}.scale")
    zero = _number_constant(0 if zero_point is None else int(zero_point), dtype, f"{name}.zero_point")
    if zero_point is None:
        quantize = ir.node("QuantizeLinear", [x, scale, zero])
        return [quantize, ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])]
    shift = _scalar(zero_point, f"{name}.shift")
    one, none = _scalar(torch.ones(()), f"{name}.one"), _number_constant(0, dtype, f"{name}.none")
    divide = ir.node("Div", [x, scale])
    add = ir.node("Add", [divide.outputs[0], shift])
    quantize = ir.node("QuantizeLinear", [add.outputs[0], one, none])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero])
    return [divide, add, quantize, dequantize]


def _scalar(field: Tensor, name: str) -> ir.Value:
    return constant_of(to_onnx(field.to(torch.float32).reshape(()), name))


def _number_constant(number: int, dtype: ir.DataType, name: str) -> ir.Value:
    """A scalar of `dtype`; its type is that of the codes that QuantizeLinear gives."""
    pattern = torch.tensor(number, dtype=torch.uint8)
    return constant_of(numbers_to_onnx(lambda: pattern, dtype, (), name))
