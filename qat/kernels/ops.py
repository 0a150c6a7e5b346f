"""The operators of the project: each declared once, with its PyTorch reference as the body.

This file is the only place that decides what runs where. Operators take the view `[groups, elements]` and plain
tensors, because `torch.library` knows neither formats nor granularities; the functions below them take ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.kernels.codebook_means import reference as codebook_means
from qat.kernels.fake_quantize import reference
from qat.kernels.operand_codes import reference as operand_codes
from qat.kernels.scaled_product import reference as plain_product
from qat.kernels.scaled_product import tensor_cores
from qat.kernels.scaled_product.operand import Operand
from qat.kernels.siblings import once_for_siblings
from qat.numerics import functional
from qat.numerics.dynamic import DYNAMIC_RULES, check_rule
from qat.numerics.formats import Format, VectorFormat, parse_format
from qat.numerics.granularity import Granularity, PerTensor, PerToken
from qat.numerics.qtensor import QParams, ViewParams, codes_shape, elements_shape
from qat.numerics.ste import straight_through
from qat.scratch import scratch

# Every operator ends with the same arguments: the grid, or what it follows from.
_GRID = "Tensor scale, Tensor? zero_point, Tensor? codebook, str format"
_RULE = "str rule, ScalarType scale_dtype"
_HAS_TRITON = find_spec("triton") is not None
_references_only = False


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Compute with the PyTorch references, also where there are faster kernels: to test, to measure, to bisect."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and _HAS_TRITON and not _references_only


def _in_triton(x: Tensor, format: Format) -> bool:
    return _runs_triton(x) and not isinstance(format, VectorFormat)


def _operator(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag
) -> Callable[..., Any]:
    """Declare one operator, `qat::name(arguments) -> results`, and return how to call it.

    `torch.library.custom_op` would declare it in one call, but costs 0.1 ms a call on a CPU, 800 times in a step.
    Torch's dispatcher too takes longer than a small kernel on a GPU: where it has nothing to do, it is passed by.
    """
    name, _, signature = schema.partition("(")
    torch.library.define(f"qat::{name}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    torch.library.impl(f"qat::{name}", "default")(torch.no_grad()(reference))
    torch.library.register_fake(f"qat::{name}", fake)
    operator: torch._ops.OpOverload = getattr(torch.ops.qat, name).default

    @wraps(reference)
    def call(x: Tensor, *arguments: Any) -> Any:
        return operator(x, *arguments) if _is_watched(x) else reference(x, *arguments)

    return call


def _is_watched(x: Tensor) -> bool:
    """Whether autograd, a compiler, a mode, a profiler or a kind of tensors wants to see operators on `x`."""
    return (
        torch.compiler.is_compiling()
        or not x.is_cuda
        or torch.is_grad_enabled()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
    )


def _grid(grid: Sequence[Any]) -> tuple[ViewParams, Format]:
    *params, format = grid
    return ViewParams(*params), parse_format(format)


def _kernels(x: Tensor, format: Format) -> Any:
    """The module that computes on `x`. Triton is imported at its first use: `import qat` stays light."""
    if not _in_triton(x, format):
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
        _kernels(x, format).dequantize(codes, out, params, format)


def _backward_of_view(
    grad: Tensor, x: Tensor, codes: Tensor | None, x_hat: Tensor | None, needs: list[bool], *grid: Any
) -> tuple[Tensor, Tensor, Tensor]:
    params, format = _grid(grid)
    if not _in_triton(x, format):
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
    if not _in_triton(x, format):
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


def _row_codes(
    x: Tensor, factor: Tensor | None, seed: Tensor | None, scale_dtype: torch.dtype, format: str
) -> tuple[Tensor, Tensor]:
    grid = parse_format(format)
    if not _in_triton(x, grid):
        return operand_codes.row_codes(x, factor, _noise(seed, x.shape), scale_dtype, grid)
    from qat.kernels.operand_codes import rows

    return rows.row_codes(x, factor, seed, scale_dtype, grid)


def _column_codes(
    x: Tensor, factor: Tensor, seed: Tensor | None, scale_dtype: torch.dtype, format: str
) -> tuple[Tensor, Tensor]:
    grid = parse_format(format)
    if not _in_triton(x, grid):
        return operand_codes.column_codes(x, factor, _noise(seed, x.T.shape), scale_dtype, grid)
    from qat.kernels.operand_codes import columns

    return columns.column_codes(x, factor, seed, scale_dtype, grid)


def _noise(seed: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Other numbers than the kernels draw, from the same seed."""
    if seed is None:
        return None
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    return torch.rand(shape, generator=generator, device=seed.device)


def _row_codes_fake(x: Tensor, factor: Tensor | None, seed: Tensor | None, *grid: Any) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=parse_format(grid[-1]).code_dtype)
    return codes, x.new_empty((len(x), 1), dtype=torch.float32)


def _column_codes_fake(x: Tensor, factor: Tensor, seed: Tensor | None, *grid: Any) -> tuple[Tensor, Tensor]:
    return _row_codes_fake(x.new_empty((x.shape[1], x.shape[0])), factor, seed, *grid)


def _transposed(codes: Tensor) -> Tensor:
    if not _runs_triton(codes):
        return operand_codes.transposed(codes)
    from qat.kernels.operand_codes.transposed import transposed

    return transposed(codes)


def _lloyd_step(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> None:
    if not _runs_triton(x):
        return codebook_means.lloyd_step_(x, scale, codebook, importance)
    from qat.kernels.codebook_means import triton

    return triton.lloyd_step_(x, scale, codebook, importance)


quantize_view = _operator(f"quantize(Tensor x, {_GRID}) -> Tensor", _quantize, _codes_fake)
_quantize_stochastic_view = _operator(
    f"quantize_stochastic(Tensor x, {_GRID}) -> Tensor",
    _quantize_stochastic,
    _codes_fake,
    torch.Tag.nondeterministic_seeded,
)
dequantize_view_ = _operator(
    f"dequantize_(Tensor codes, Tensor(a!) out, {_GRID}) -> ()", _dequantize, lambda codes, out, *grid: None
)
fake_quantize_view = _operator(
    f"fake_quantize(Tensor x, ScalarType dtype, {_GRID}) -> Tensor",
    _fake_quantize,
    lambda x, dtype, *grid: x.new_empty(x.shape, dtype=dtype),
)
# The values of the forward pass once more. An operator of its own, because a compiler that found the other one twice
# would keep the first result instead.
restore_view_ = _operator(
    f"restore_(Tensor x, Tensor? codes, Tensor(a!) out, {_GRID}) -> ()", _restore, lambda x, codes, out, *grid: None
)
_fake_quantize_backward_ = _operator(
    "fake_quantize_backward_(Tensor(a!) grad, Tensor x, Tensor? codes, Tensor(b!)? x_hat, bool[] needs, "
    f"{_GRID}) -> (Tensor, Tensor, Tensor)",
    _backward_of_view,
    _backward_fake,
)
fake_quantize_dynamic_view = _operator(
    f"fake_quantize_dynamic(Tensor x, ScalarType dtype, {_RULE}, Tensor? codebook, str format) -> Tensor",
    _dynamic,
    lambda x, dtype, *rule: x.new_empty(x.shape, dtype=dtype),
)
restore_dynamic_view_ = _operator(
    f"restore_dynamic_(Tensor x, Tensor(a!) out, {_RULE}, Tensor? codebook, str format) -> ()",
    _restore_dynamic,
    lambda x, out, *rule: None,
)
_dynamic_params_of_view = _operator(
    f"dynamic_params(Tensor x, {_RULE}, str format) -> (Tensor, Tensor)", _dynamic_params, _dynamic_params_fake
)
_CODES = "Tensor? seed, ScalarType scale_dtype, str format) -> (Tensor, Tensor)"
_row_codes_of = _operator(f"row_codes(Tensor x, Tensor? factor, {_CODES}", _row_codes, _row_codes_fake)
_column_codes_of = _operator(f"column_codes(Tensor x, Tensor factor, {_CODES}", _column_codes, _column_codes_fake)
_transposed_codes = _operator(
    "transposed_codes(Tensor codes) -> Tensor", _transposed, lambda codes: codes.new_empty(codes.shape[::-1])
)
_lloyd_step_ = _operator(
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
    dequantize_view_(codes, x_hat, *grid)
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

    Equal to `qat.numerics.functional.fake_quantize` in value and in every gradient, for finite x.
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


def codes_to_multiply(
    x: Tensor, qparams: QParams, format: Format, granularity: Granularity, stored: bool = False
) -> Tensor:
    """As `quantize`; a compiler sees plain PyTorch and fuses it with what makes x, which then is written nowhere.

    `stored`: x is a weight, which nothing makes. On a GPU its codes come from our kernels under a compiler too.
    """
    if _left_to_a_compiler(x, format, stored):
        return functional.quantize(x.detach(), qparams, format, granularity).codes
    return quantize(x.detach(), qparams, format, granularity)


def dynamic_codes_to_multiply(
    x: Tensor, rule: str, format: Format, granularity: Granularity, scale_dtype: torch.dtype, stored: bool = False
) -> tuple[Tensor, QParams]:
    """Codes of `x` under the scale that `rule` finds for it, and that; once for layers that stand side by side."""

    def computed() -> tuple[Tensor, QParams]:
        shape = granularity.param_shape(x.shape)
        if _left_to_a_compiler(x, format, stored):
            found = DYNAMIC_RULES[rule](granularity.view(x.detach()), format, scale_dtype)
            qparams = QParams(found.scale.reshape(shape))
        elif rule == "absmax" and granularity != PerTensor() and _in_triton(x, format):
            codes, scale = _row_codes_of(granularity.view(x.detach()), None, None, scale_dtype, format.name)
            return granularity.unview(codes, x.shape), QParams(scale.reshape(shape))
        else:
            qparams = dynamic_qparams(x, rule, format, granularity, scale_dtype)
        return codes_to_multiply(x, qparams, format, granularity, stored), qparams

    return once_for_siblings(x, ("codes", rule, format.name, granularity, scale_dtype), computed)


def _left_to_a_compiler(x: Tensor, format: Format, stored: bool) -> bool:
    return torch.compiler.is_compiling() and not (stored and _in_triton(x, format))


def gradient_codes(
    g: Tensor,
    factor: Tensor,
    format: Format,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    stochastic: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of g * factor, or of its transpose: the gradient as a product takes it.

    On a GPU kernels find them, under a compiler too, which would sum along tokens slowly. They draw from a seed that
    torch's generator draws, so that `torch.manual_seed` repeats them and nobody waits for the device. Elsewhere, and
    with one scale for the whole gradient, plain PyTorch does.

    Args:
        g: `[tokens, out]`.
        factor: float32, `[1, out]`, transposed `[tokens, 1]`, or `[1, 1]`.
        granularity: per token (of what is returned) or per tensor.
        transpose: whether to return codes `[out, tokens]`.

    Returns:
        codes `[tokens, out]` or `[out, tokens]`, and scales `[rows, 1]` or `[1, 1]` of them.
    """
    if granularity == PerToken() and _in_triton(g, format):
        seed = torch.randint(2**62, (1,), device=g.device) if stochastic else None
        operator = _column_codes_of if transpose else _row_codes_of
        found: tuple[Tensor, Tensor] = operator(g, factor, seed, scale_dtype, format.name)
        return found
    shape = g.T.shape if transpose else g.shape
    noise = torch.rand(shape, device=g.device) if stochastic else None
    plain = operand_codes.column_codes if transpose else operand_codes.row_codes
    return plain(g, factor, noise, scale_dtype, format, granularity)


def transposed_codes(codes: Tensor) -> Tensor:
    """`codes` `[rows, k]`, a byte each, as `[k, rows]`: contiguous on a GPU, elsewhere a view that a compiler fuses."""
    return _transposed_codes(codes) if _runs_triton(codes) else codes.T


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


def scaled_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """y = (decode(a) @ decode(b)^T) * s_a * s_b^T, `[rows of a, rows of b]` in `dtype`.

    No operator of its own: a compiler sees through it, and fuses the scales.
    """
    plain = _references_only or (a.is_float and not a.codes.is_cuda)
    return (plain_product if plain else tensor_cores).scaled_product(a, b, dtype)
