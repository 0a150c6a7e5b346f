"""The operators of the project: each declared once, with its PyTorch reference as the body.

This file is the only place that decides what runs where. Operators take the view `[groups, elements]` and plain
tensors, because `torch.library` knows neither formats nor granularities; the functions below them take ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels.fake_quantize import reference
from qat.numerics.formats import Format, parse_format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, ViewParams

# Every operator ends with the same arguments: the grid.
_GRID = "Tensor scale, Tensor? zero_point, Tensor? codebook, str format"


class Grid:
    """The last four arguments of every operator, for a view of so many groups."""

    def __init__(self, scale: Tensor, zero_point: Tensor | None, codebook: Tensor | None, format: str) -> None:
        self.params = ViewParams(scale, zero_point, codebook, None)
        self.format = parse_format(format)


@torch.library.custom_op("qat::quantize", mutates_args=(), schema=f"(Tensor x, {_GRID}) -> Tensor")
def _quantize(x: Tensor, *grid: Any) -> Tensor:
    g = Grid(*grid)
    return reference.quantize(x, g.params, g.format)


@_quantize.register_fake
def _(x: Tensor, *grid: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=Grid(*grid).format.code_dtype)


@torch.library.custom_op(
    "qat::dequantize_", mutates_args={"out"}, schema=f"(Tensor codes, Tensor(a!) out, {_GRID}) -> ()"
)
def _dequantize(codes: Tensor, out: Tensor, *grid: Any) -> None:
    g = Grid(*grid)
    reference.dequantize(codes, out, g.params, g.format)


@_dequantize.register_fake
def _(codes: Tensor, out: Tensor, *grid: Any) -> None:
    return None


@torch.library.custom_op("qat::fake_quantize", mutates_args=(), schema=f"(Tensor x, {_GRID}) -> Tensor")
def _fake_quantize(x: Tensor, *grid: Any) -> Tensor:
    g = Grid(*grid)
    out = torch.empty_like(x)
    reference.dequantize(reference.quantize(x, g.params, g.format), out, g.params, g.format)
    return out


@_fake_quantize.register_fake
def _(x: Tensor, *grid: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "qat::fake_quantize_backward_",
    mutates_args={"grad"},
    schema=f"(Tensor(a!) grad, Tensor x, Tensor codes, bool[] needs, {_GRID}) -> (Tensor, Tensor, Tensor)",
)
def _fake_quantize_backward(
    grad: Tensor, x: Tensor, codes: Tensor, needs: list[bool], *grid: Any
) -> tuple[Tensor, Tensor, Tensor]:
    g = Grid(*grid)
    return reference.fake_quantize_backward(grad, x, codes, needs, g.params, g.format)


@_fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, codes: Tensor, needs: list[bool], *grid: Any) -> tuple[Tensor, ...]:
    scale, _, codebook, _ = grid
    shaped_like = (scale, scale, codebook)
    return tuple(
        torch.empty_like(like) if need else grad.new_empty(0) for like, need in zip(shaped_like, needs[1:], strict=True)
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.format = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *params = ctx.saved_tensors
    codes = _quantize(x, *params, ctx.format)
    return (*gradients_(grad.clone(), x, codes, ctx.needs_input_grad[:4], *params, ctx.format), None)


torch.library.register_autograd("qat::fake_quantize", _backward, setup_context=_save_for_backward)


def gradients_(grad: Tensor, x: Tensor, codes: Tensor, needs: Sequence[bool], *grid: Any) -> tuple[Tensor | None, ...]:
    """Gradients to x, scale, zero point and codebook as autograd wants them: None where not needed.

    `grad`, the gradient of x_hat, is overwritten by the gradient of x.
    """
    clips = needs[0] and Grid(*grid).format.saturates
    if clips or any(needs[1:]):
        found = _fake_quantize_backward(grad, x, codes, [clips, *needs[1:]], *grid)
    else:
        found = (grad,) * 3
    return tuple(gradient if need else None for gradient, need in zip((grad.to(x.dtype), *found), needs, strict=True))


def grid_of(qparams: QParams, format: Format, groups: int) -> tuple[Any, ...]:
    """The grid arguments of an operator on a view of `groups` groups.

    Raises:
        InputError: if the qparams were made for another number of groups.
    """
    scale, zero_point, codebook, _ = qparams.for_view()
    if len(scale) != groups:
        raise InputError(
            f"The quantizer has {len(scale)} scales, but the tensor it was given has {groups} groups. A static or "
            "learned quantizer for activations needs granularity per_tensor or per_channel_-1."
        )
    return scale, zero_point, codebook, format.name


def fake_quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> Tensor:
    """Quantize and dequantize `x` of any shape; differentiable, saves nothing beyond x and the qparams.

    Equal to `qat.numerics.functional.fake_quantize` in value and in every gradient.
    """
    view = granularity.view(x)
    grid = grid_of(qparams, format, len(view))
    return granularity.unview(_fake_quantize(view, *grid), x.shape)


def quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> Tensor:
    """Codes of `x`, shaped like it."""
    view = granularity.view(x)
    return granularity.unview(_quantize(view, *grid_of(qparams, format, len(view))), x.shape)


def dequantize(codes: Tensor, qparams: QParams, format: Format, granularity: Granularity, dtype: torch.dtype) -> Tensor:
    """Values of `codes`, shaped like them."""
    view = granularity.view(codes)
    out = torch.empty(view.shape, dtype=dtype, device=codes.device)
    _dequantize(view, out, *grid_of(qparams, format, len(view)))
    return granularity.unview(out, codes.shape)
