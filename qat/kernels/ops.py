"""The operators of the project: each declared once, with its PyTorch reference as the body.

This file is the only place that decides what runs where. Operators take the view `[groups, elements]` and plain
tensors, because `torch.library` knows neither formats nor granularities; the functions below them take ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels.codebook_means import reference as codebook_means
from qat.kernels.fake_quantize import reference
from qat.numerics.formats import Format, parse_format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, ViewParams, codes_shape, elements_shape

# Every operator ends with the same arguments: the grid.
_GRID = "Tensor scale, Tensor? zero_point, Tensor? codebook, str format"


def _operator(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag
) -> torch._ops.OpOverload:
    """Declare one operator, `qat::name(arguments) -> results`.

    `torch.library.custom_op` would do the same in one call, but costs 0.1 ms a call on a CPU, 800 times in a step.
    """
    name, _, signature = schema.partition("(")
    torch.library.define(f"qat::{name}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    torch.library.impl(f"qat::{name}", "default")(torch.no_grad()(reference))
    torch.library.register_fake(f"qat::{name}", fake)
    operator: torch._ops.OpOverload = getattr(torch.ops.qat, name).default
    return operator


def _grid(grid: Sequence[Any]) -> tuple[ViewParams, Format]:
    *params, format = grid
    return ViewParams(*params), parse_format(format)


def _quantize_reference(x: Tensor, *grid: Any) -> Tensor:
    return reference.quantize(x, *_grid(grid))


def _quantize_stochastic_reference(x: Tensor, *grid: Any) -> Tensor:
    return reference.quantize(x, *_grid(grid), stochastic=True)


def _codes_fake(x: Tensor, *grid: Any) -> Tensor:
    format = parse_format(grid[-1])
    return x.new_empty(codes_shape(x.shape, format), dtype=format.code_dtype)


def _dequantize_reference(codes: Tensor, out: Tensor, *grid: Any) -> None:
    reference.dequantize(codes, out, *_grid(grid))


def _fake_quantize_reference(x: Tensor, *grid: Any) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    reference.dequantize(reference.quantize(x, *_grid(grid)), out, *_grid(grid))
    return out


def _backward_reference(
    grad: Tensor, x: Tensor, codes: Tensor, x_hat: Tensor | None, needs: list[bool], *grid: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.fake_quantize_backward(grad, x, codes, x_hat, needs, *_grid(grid))


def _backward_fake(
    grad: Tensor, x: Tensor, codes: Tensor, x_hat: Tensor | None, needs: list[bool], *grid: Any
) -> tuple[Tensor, ...]:
    scale, _, codebook, _ = grid
    shaped_like = (scale, scale, codebook)
    return tuple(
        torch.empty_like(like) if need else grad.new_empty(0) for like, need in zip(shaped_like, needs[1:], strict=True)
    )


def _lloyd_step_on_cuda(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> None:
    # Imported at the first call: `import qat` stays light, and machines without a GPU need no Triton.
    from qat.kernels.codebook_means import triton

    with torch.no_grad(), torch.cuda.device(x.device):
        triton.lloyd_step_(x, scale, codebook, importance)


quantize_view = _operator(f"quantize(Tensor x, {_GRID}) -> Tensor", _quantize_reference, _codes_fake)
_quantize_stochastic_view = _operator(
    f"quantize_stochastic(Tensor x, {_GRID}) -> Tensor",
    _quantize_stochastic_reference,
    _codes_fake,
    torch.Tag.nondeterministic_seeded,
)
dequantize_view_ = _operator(
    f"dequantize_(Tensor codes, Tensor(a!) out, {_GRID}) -> ()", _dequantize_reference, lambda codes, out, *grid: None
)
_fake_quantize_view = _operator(
    f"fake_quantize(Tensor x, {_GRID}) -> Tensor", _fake_quantize_reference, lambda x, *grid: x.new_empty(x.shape)
)
_fake_quantize_backward_ = _operator(
    "fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor codes, Tensor(b!)? x_hat, bool[] needs, "
    f"{_GRID}) -> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)
_lloyd_step_ = _operator(
    "lloyd_step_(Tensor x, Tensor scale, Tensor(a!) codebook, Tensor? importance) -> ()",
    codebook_means.lloyd_step_,
    lambda x, scale, codebook, importance: None,
)
torch.library.impl("qat::lloyd_step_", "cuda")(_lloyd_step_on_cuda)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.format = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("qat::fake_quantize has no second derivative; that of qat.numerics.functional has.")
    x, *params = ctx.saved_tensors
    codes = quantize_view(x, *params, ctx.format)
    return (*gradients_(grad.clone(), x, codes, None, ctx.needs_input_grad[:4], *params, ctx.format), None)


torch.library.register_autograd("qat::fake_quantize", _backward, setup_context=_save_for_backward)


def gradients_(
    grad: Tensor, x: Tensor, codes: Tensor, x_hat: Tensor | None, needs: Sequence[bool], *grid: Any, clip: bool = True
) -> tuple[Tensor | None, ...]:
    """Gradients to x, scale, zero point and codebook as autograd wants them: None where not needed.

    `grad`, the gradient of x_hat, is overwritten by the gradient of x; `x_hat`, if given, by the values of the codes.
    Without `clip` the gradient of x is that of x_hat, also beyond the grid.
    """
    clips = clip and needs[0] and parse_format(grid[-1]).saturates
    if clips or x_hat is not None or any(needs[1:]):
        found = _fake_quantize_backward_(grad, x, codes, x_hat, [clips, *needs[1:]], *grid)
    else:
        found = (grad,) * 3
    return tuple(gradient if need else None for gradient, need in zip((grad.to(x.dtype), *found), needs, strict=True))


def grid_of(qparams: QParams, format: Format, groups: int) -> tuple[Any, ...]:
    """The grid arguments of an operator on a view of `groups` groups.

    Raises:
        InputError: if the qparams were made for another number of groups, or hold an offset.
    """
    scale, zero_point, codebook, offset = qparams.for_view()
    if offset is not None:
        raise InputError("Kernels know no offset: fold it into x, or use qat.numerics.functional.")
    if len(scale) != groups:
        raise InputError(
            f"The quantizer has {len(scale)} scales, but the tensor it was given has {groups} groups. A static or "
            "learned quantizer for activations needs granularity per_tensor or per_channel_-1."
        )
    return scale, zero_point, codebook, format.name


def fake_quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> Tensor:
    """Quantize and dequantize `x` of any shape; differentiable, saves nothing beyond x and the qparams.

    Equal to `qat.numerics.functional.fake_quantize` in value and in every gradient, for finite x.
    """
    view = granularity.view(x)
    grid = grid_of(qparams, format, len(view))
    return granularity.unview(_fake_quantize_view(view, *grid), x.shape)


def quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity, stochastic: bool = False) -> Tensor:
    """Codes of `x`: the nearest, or stochastic ones whose expectation is x."""
    view = granularity.view(x)
    operator = _quantize_stochastic_view if stochastic else quantize_view
    codes = operator(view, *grid_of(qparams, format, len(view)))
    return granularity.of_codes(format.block).unview(codes, codes_shape(x.shape, format))


def dequantize(codes: Tensor, qparams: QParams, format: Format, granularity: Granularity, dtype: torch.dtype) -> Tensor:
    """Values of `codes`, shaped like the tensor that was quantized."""
    view = granularity.of_codes(format.block).view(codes)
    out = torch.empty(elements_shape(view.shape, format), dtype=dtype, device=codes.device)
    dequantize_view_(view, out, *grid_of(qparams, format, len(view)))
    return granularity.unview(out, elements_shape(codes.shape, format))


def lloyd_step_(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None = None) -> None:
    """Move each entry of a codebook to the mean of its members; see `qat.kernels.codebook_means.reference`.

    Args:
        x: the view `[groups, elements]`.
        scale: `[groups, 1]`, of any floating dtype.
        codebook: `[rows, entries]` float32, contiguous, in any order; overwritten.
        importance: weights of x, shaped like it; None weighs evenly.
    """
    _lloyd_step_(x, scale, codebook, importance)
