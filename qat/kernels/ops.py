"""The operators of fake quantization: each declared once, with its PyTorch reference as the body.

What runs where is decided here, and for products of codes in `product_ops.py`, by what `dispatch.py` knows. Operators
take the view `[groups, elements]` and plain tensors, because `torch.library` knows neither formats nor granularities;
the functions below them take ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels import dispatch
from qat.kernels.codebook_means import reference as codebook_means
from qat.kernels.dispatch import operator
from qat.kernels.dispatch import reference_kernels as reference_kernels
from qat.kernels.fake_quantize import reference
from qat.kernels.siblings import once_for_siblings
from qat.numerics.dynamic import DYNAMIC_RULES, check_rule
from qat.numerics.formats import Format, VectorFormat, parse_format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, QuantizedTensor, ViewParams, codes_shape, elements_shape
from qat.numerics.ste import straight_through
from qat.scratch import scratch

# Every operator ends with the same arguments: the grid, or what it follows from.
_GRID = "Tensor scale, Tensor? zero_point, Tensor? codebook, str format"
_RULE = "str rule, ScalarType scale_dtype"


def quantizes_in_triton(x: Tensor, format: Format) -> bool:
    """Whether Triton's kernels find the codes of `x` on the grid `format`; they have none for vector codebooks."""
    return dispatch.runs_triton(x) and not isinstance(format, VectorFormat)


def _grid(grid: Sequence[Any]) -> tuple[ViewParams, Format]:
    *params, format = grid
    return ViewParams(*params), parse_format(format)


def _kernels(x: Tensor, format: Format) -> Any:
    """The module that computes on `x`. Triton is imported at its first use: `import qat` stays light."""
    if not quantizes_in_triton(x, format):
        return reference
    from qat.kernels.fake_quantize import triton

    return triton


def _quantize(x: Tensor, *grid: Any) -> Tensor:
    params, format = _grid(grid)
    codes: Tensor = _kernels(x, format).quantize(x, params, format)
    return codes


def _quantize_stochastic(x: Tensor, *grid: Any) -> Tensor:
    return reference.quantize(x, *_grid(grid), stochastic=True)


def _codes_fake(x: Tensor, *grid: Any) -> Tensor:
    format = parse_format(grid[-1])
    return x.new_empty(codes_shape(x.shape, format), dtype=format.code_dtype)


def _dequantize(codes: Tensor, out: Tensor, *grid: Any) -> None:
    params, format = _grid(grid)
    _kernels(codes, format).dequantize(codes, out, params, format)


def _fake_quantize(x: Tensor, dtype: torch.dtype, *grid: Any) -> Tensor:
    params, format = _grid(grid)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _kernels(x, format).fake_quantize(x, out, params, format)
    return out


def _restore(x: Tensor, codes: Tensor | None, out: Tensor, *grid: Any) -> None:
    params, format = _grid(grid)
    if codes is None:
        _kernels(x, format).fake_quantize(x, out, params, format)
    else:
        reference.restore(x, codes, out, params, format)


def _backward_of_view(
    grad: Tensor, x: Tensor, codes: Tensor | None, x_hat: Tensor | None, needs: list[bool], *grid: Any
) -> tuple[Tensor, Tensor, Tensor]:
    params, format = _grid(grid)
    if not quantizes_in_triton(x, format):
        return reference.fake_quantize_backward(grad, x, codes, x_hat, needs, params, format)
    from qat.kernels.fake_quantize import backward

    return backward.fake_quantize_backward(grad, x, codes, x_hat, needs, params, format)


def _backward_fake(
    grad: Tensor, x: Tensor, codes: Tensor | None, x_hat: Tensor | None, needs: list[bool], *grid: Any
) -> tuple[Tensor, ...]:
    scale, _, codebook, _ = grid
    shaped_like = (scale, scale, codebook)
    return tuple(
        torch.empty_like(like) if need else grad.new_empty(0) for like, need in zip(shaped_like, needs[1:], strict=True)
    )


def _dynamic_kernels(x: Tensor, rule: str, format: Format) -> Any:
    """The module that finds scales of `x` and uses them in one pass; None where there is none."""
    if not quantizes_in_triton(x, format):
        return None
    from qat.kernels.fake_quantize import dynamic

    return dynamic if dynamic.takes(x, rule) else None


def _dynamic(x: Tensor, dtype: torch.dtype, *rule: Any) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _restore_dynamic(x, out, *rule)
    return out


def _restore_dynamic(
    x: Tensor, out: Tensor, rule: str, scale_dtype: torch.dtype, codebook: Tensor | None, format: str
) -> None:
    grid = parse_format(format)
    kernels = _dynamic_kernels(x, rule, grid)
    if kernels is not None:
        return kernels.fake_quantize(x, out, rule, scale_dtype, codebook, grid)
    scale, zero_point, *_ = DYNAMIC_RULES[rule](x, grid, scale_dtype)
    return _kernels(x, grid).fake_quantize(x, out, ViewParams(scale, zero_point, codebook), grid)


def _dynamic_params(x: Tensor, rule: str, scale_dtype: torch.dtype, format: str) -> tuple[Tensor, Tensor]:
    grid = parse_format(format)
    kernels = _dynamic_kernels(x, rule, grid)
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.params(x, rule, scale_dtype, grid)
        return found
    scale, zero_point, *_ = DYNAMIC_RULES[rule](x, grid, scale_dtype)
    return scale, scale.new_empty(0) if zero_point is None else zero_point


def _dynamic_params_fake(x: Tensor, rule: str, scale_dtype: torch.dtype, format: str) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((len(x), 1), dtype=torch.float32)
    return scale, torch.empty_like(scale) if rule == "minmax" else scale.new_empty(0)


def _lloyd_step(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> None:
    if not dispatch.runs_triton(x):
        return codebook_means.lloyd_step_(x, scale, codebook, importance)
    from qat.kernels.codebook_means import triton

    return triton.lloyd_step_(x, scale, codebook, importance)


quantize_view = operator(f"quantize(Tensor x, {_GRID}) -> Tensor", _quantize, _codes_fake)
_quantize_stochastic_view = operator(
    f"quantize_stochastic(Tensor x, {_GRID}) -> Tensor",
    _quantize_stochastic,
    _codes_fake,
    torch.Tag.nondeterministic_seeded,
)
dequantize_view_ = operator(
    f"dequantize_(Tensor codes, Tensor(a!) out, {_GRID}) -> ()", _dequantize, lambda codes, out, *grid: None
)
fake_quantize_view = operator(
    f"fake_quantize(Tensor x, ScalarType dtype, {_GRID}) -> Tensor",
    _fake_quantize,
    lambda x, dtype, *grid: x.new_empty(x.shape, dtype=dtype),
)
# The values of the forward pass once more. An operator of its own, because a compiler that found the other one twice
# would keep the first result instead.
restore_view_ = operator(
    f"restore_(Tensor x, Tensor? codes, Tensor(a!) out, {_GRID}) -> ()", _restore, lambda x, codes, out, *grid: None
)
_fake_quantize_backward_ = operator(
    "fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor? codes, Tensor(b!)? x_hat, bool[] needs, "
    f"{_GRID}) -> (Tensor, Tensor, Tensor)",
    _backward_of_view,
    _backward_fake,
)
fake_quantize_dynamic_view = operator(
    f"fake_quantize_dynamic(Tensor x, ScalarType dtype, {_RULE}, Tensor? codebook, str format) -> Tensor",
    _dynamic,
    lambda x, dtype, *rule: x.new_empty(x.shape, dtype=dtype),
)
restore_dynamic_view_ = operator(
    f"restore_dynamic_(Tensor x, Tensor(a!) out, {_RULE}, Tensor? codebook, str format) -> ()",
    _restore_dynamic,
    lambda x, out, *rule: None,
)
_dynamic_params_of_view = operator(
    f"dynamic_params(Tensor x, {_RULE}, str format) -> (Tensor, Tensor)", _dynamic_params, _dynamic_params_fake
)
_lloyd_step_ = operator(
    "lloyd_step_(Tensor x, Tensor scale, Tensor(a!) codebook, Tensor? importance) -> ()",
    _lloyd_step,
    lambda x, scale, codebook, importance: None,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *params, ctx.format = inputs
    ctx.save_for_backward(x, *params)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("qat::fake_quantize has no second derivative; that of qat.numerics.functional has.")
    x, *params = ctx.saved_tensors
    need_x, _, *needs, _ = ctx.needs_input_grad
    own = grad.clone(memory_format=torch.contiguous_format)
    clip = parse_format(ctx.format).saturates
    dx, *others = gradients_(own, x, None, None, (need_x, *needs), *params, ctx.format, clip=clip)
    return dx, None, *others, None


torch.library.register_autograd("qat::fake_quantize", _backward, setup_context=_save_for_backward)


def fake_quantize_to_keep(
    x: Tensor, codes: Tensor | None, dtype: torch.dtype, *grid: Any
) -> tuple[Tensor, Tensor | None]:
    """x_hat of a view, good until the next call, and what the backward pass shall be given as `codes`.

    `codes`: of x, where they are known.
    """
    if not keeps_codes(x):
        return fake_quantize_view(x, dtype, *grid), None
    codes = quantize_view(x, *grid) if codes is None else codes
    x_hat = scratch("weight", x.shape, dtype, x.device)
    restore_view_(x, codes, x_hat, *grid)
    return x_hat, codes


def gradients_(
    grad: Tensor,
    x: Tensor,
    codes: Tensor | None,
    x_hat: Tensor | None,
    needs: Sequence[bool],
    *grid: Any,
    clip: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients to x, scale, zero point and codebook as autograd wants them: None where not needed.

    `grad`, the gradient of x_hat, is overwritten by the gradient of x; `x_hat`, if given, by the values of the codes.
    `clip`: whether x beyond the grid gets none, which is for formats that saturate.
    """
    clips = clip and needs[0]
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

    Equal to `qat.numerics.functional.fake_quantize` in value and in every gradient.
    """
    view = granularity.view(x)
    grid = grid_of(qparams, format, len(view))
    return granularity.unview(fake_quantize_view(view, x.dtype, *grid), x.shape)


def fake_quantize_dynamic(
    x: Tensor,
    rule: str,
    format: Format,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    """As `fake_quantize` with the qparams that `rule` finds for `x`, in one pass where a kernel can; straight through.

    Where several layers that stand side by side quantize the same x alike, all get the result of the first.
    """
    check_rule(rule, granularity, x.shape)
    arguments = rule_arguments(rule, format, scale_dtype, codebook)

    def computed() -> Tensor:
        with torch.no_grad():
            return granularity.unview(fake_quantize_dynamic_view(granularity.view(x), x.dtype, *arguments), x.shape)

    # Each its own way back: gradients are summed at x in the order in which a compiled model sums them.
    shared = codebook is None
    return straight_through(x, once_for_siblings(x, (granularity, *arguments), computed) if shared else computed())


def rule_arguments(rule: str, format: Format, scale_dtype: torch.dtype, codebook: Tensor | None) -> tuple[Any, ...]:
    """The last arguments of an operator that finds the scales itself."""
    return rule, scale_dtype, None if codebook is None else codebook.reshape(-1, codebook.shape[-1]), format.name


def keeps_codes(weight: Tensor) -> bool:
    """Whether codes of a weight are worth keeping for the backward pass: a GPU finds them faster than it reads them."""
    return not weight.is_cuda


def dynamic_qparams(
    x: Tensor, rule: str, format: Format, granularity: Granularity, scale_dtype: torch.dtype
) -> QParams:
    """Compute qparams from `x` itself by a named rule of `qat.numerics.dynamic.DYNAMIC_RULES`.

    Raises:
        InputError: if no rule is called that, or it takes means and `granularity` pads `x` with zeros.
    """
    check_rule(rule, granularity, x.shape)
    with torch.no_grad():
        scale, zero_point = _dynamic_params_of_view(granularity.view(x), rule, scale_dtype, format.name)
    shape = granularity.param_shape(x.shape)
    return QParams(scale.reshape(shape), zero_point.reshape(shape) if rule == "minmax" else None)


def quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity, stochastic: bool = False) -> Tensor:
    """Codes of `x`: the nearest, or stochastic ones whose expectation is x."""
    view = granularity.view(x)
    operator = _quantize_stochastic_view if stochastic else quantize_view
    codes = operator(view, *grid_of(qparams, format, len(view)))
    return granularity.of_codes(format.block).unview(codes, codes_shape(x.shape, format))


def dequantize(codes: Tensor, qparams: QParams, format: Format, granularity: Granularity, dtype: torch.dtype) -> Tensor:
    """Values of `codes`, shaped like the tensor that was quantized."""
    if qparams.offset is not None:  # no kernel adds one: only files that others wrote hold such weights
        return QuantizedTensor(codes, qparams, format, granularity, dtype).dequantize()
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
