"""The operators that find what a product of codes multiplies, and the product.

They are to `ops.py`, which has those of fake quantization, as products of codes are to fake quantization.
"""

from typing import Any

import torch
from torch import Tensor

from qat.kernels import dispatch, ops
from qat.kernels.dispatch import operator
from qat.kernels.operand_codes import reference as operand_codes
from qat.kernels.scaled_product import reference as plain_product
from qat.kernels.scaled_product import tensor_cores
from qat.kernels.scaled_product.operand import Operand
from qat.kernels.siblings import once_for_siblings
from qat.numerics import functional
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import Format, parse_format
from qat.numerics.granularity import Granularity, PerTensor, PerToken
from qat.numerics.qtensor import QParams


def _row_codes(
    x: Tensor, factor: Tensor | None, seed: Tensor | None, scale_dtype: torch.dtype, format: str
) -> tuple[Tensor, Tensor]:
    grid = parse_format(format)
    if not ops._in_triton(x, grid):
        return operand_codes.row_codes(x, factor, _noise(seed, x.shape), scale_dtype, grid)
    from qat.kernels.operand_codes import rows

    return rows.row_codes(x, factor, seed, scale_dtype, grid)


def _column_codes(
    x: Tensor, factor: Tensor, seed: Tensor | None, scale_dtype: torch.dtype, format: str
) -> tuple[Tensor, Tensor]:
    grid = parse_format(format)
    if not ops._in_triton(x, grid):
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
    if not dispatch.runs_triton(codes):
        return operand_codes.transposed(codes)
    from qat.kernels.operand_codes.transposed import transposed

    return transposed(codes)


_CODES = "Tensor? seed, ScalarType scale_dtype, str format) -> (Tensor, Tensor)"
_row_codes_of = operator(f"row_codes(Tensor x, Tensor? factor, {_CODES}", _row_codes, _row_codes_fake)
_column_codes_of = operator(f"column_codes(Tensor x, Tensor factor, {_CODES}", _column_codes, _column_codes_fake)
_transposed_codes = operator(
    "transposed_codes(Tensor codes) -> Tensor", _transposed, lambda codes: codes.new_empty(codes.shape[::-1])
)


def codes_to_multiply(
    x: Tensor, qparams: QParams, format: Format, granularity: Granularity, stored: bool = False
) -> Tensor:
    """As `quantize`; a compiler sees plain PyTorch and fuses it with what makes x, which then is written nowhere.

    `stored`: x is a weight, which nothing makes. On a GPU its codes come from our kernels under a compiler too.
    """
    if _left_to_a_compiler(x, format, stored):
        return functional.quantize(x.detach(), qparams, format, granularity).codes
    return ops.quantize(x.detach(), qparams, format, granularity)


def dynamic_codes_to_multiply(
    x: Tensor, rule: str, format: Format, granularity: Granularity, scale_dtype: torch.dtype, stored: bool = False
) -> tuple[Tensor, QParams]:
    """Codes of `x` under the scale that `rule` finds for it, and that; once for layers that stand side by side."""

    def computed() -> tuple[Tensor, QParams]:
        shape = granularity.param_shape(x.shape)
        if _left_to_a_compiler(x, format, stored):
            found = DYNAMIC_RULES[rule](granularity.view(x.detach()), format, scale_dtype)
            qparams = QParams(found.scale.reshape(shape))
        elif rule == "absmax" and granularity != PerTensor() and ops._in_triton(x, format):
            codes, scale = _row_codes_of(granularity.view(x.detach()), None, None, scale_dtype, format.name)
            return granularity.unview(codes, x.shape), QParams(scale.reshape(shape))
        else:
            qparams = ops.dynamic_qparams(x, rule, format, granularity, scale_dtype)
        return codes_to_multiply(x, qparams, format, granularity, stored), qparams

    return once_for_siblings(x, ("codes", rule, format.name, granularity, scale_dtype), computed)


def _left_to_a_compiler(x: Tensor, format: Format, stored: bool) -> bool:
    return torch.compiler.is_compiling() and not (stored and ops._in_triton(x, format))


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
    if granularity == PerToken() and ops._in_triton(g, format):
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
    return _transposed_codes(codes) if dispatch.runs_triton(codes) else codes.T


def scaled_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """y = (decode(a) @ decode(b)^T) * s_a * s_b^T, `[rows of a, rows of b]` in `dtype`.

    No operator of its own: a compiler sees through it, and fuses the scales.
    """
    plain = dispatch.only_references() or (a.is_float and not a.codes.is_cuda)
    return (plain_product if plain else tensor_cores).scaled_product(a, b, dtype)
