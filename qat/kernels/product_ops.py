"""The operators that find what a product of codes multiplies, and the product.

They are to `ops.py`, which has those of fake quantization, as products of codes are to fake quantization.
"""

from typing import Any

import torch
from torch import Tensor

from qat.kernels import dispatch, ops
from qat.kernels.dispatch import operator
from qat.kernels.operand_codes import reference as operand_codes
from qat.kernels.operand_codes.reference import GradientCodes
from qat.kernels.scaled_product import reference as plain_product
from qat.kernels.scaled_product import tensor_cores
from qat.kernels.scaled_product.operand import Operand
from qat.kernels.siblings import once_for_siblings
from qat.numerics import functional
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import Format, parse_format
from qat.numerics.granularity import Granularity, PerTensor
from qat.numerics.qtensor import QParams


def _row_codes(x: Tensor, scale_dtype: torch.dtype, format: str) -> tuple[Tensor, Tensor]:
    grid = parse_format(format)
    if not ops.quantizes_in_triton(x, grid):
        return operand_codes.row_codes(x, scale_dtype, grid)
    from qat.kernels.operand_codes import rows

    return rows.row_codes(x, scale_dtype, grid)


def _row_codes_fake(x: Tensor, scale_dtype: torch.dtype, format: str) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=parse_format(format).code_dtype)
    return codes, x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _gradient_codes(
    g: Tensor,
    across: Tensor | None,
    down: Tensor | None,
    seed: Tensor | None,
    scale_dtype: torch.dtype,
    format: str,
    whole: bool,
) -> GradientCodes:
    grid = parse_format(format)
    if not ops.quantizes_in_triton(g, grid):
        return operand_codes.gradient_codes(g, across, down, _noise(seed, (2, *g.shape)), scale_dtype, grid, whole)
    from qat.kernels.operand_codes import gradients

    return gradients.gradient_codes(g, across, down, seed, scale_dtype, grid, whole)


def _noise(seed: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Other numbers than the kernels draw, from the same seed."""
    if seed is None:
        return None
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    return torch.rand(shape, generator=generator, device=seed.device)


def _gradient_codes_fake(
    g: Tensor, across: Tensor | None, down: Tensor | None, seed: Tensor | None, *grid: Any
) -> tuple[Tensor, ...]:
    _, format, whole = grid
    shapes = operand_codes.codes_shapes(g, across, down)
    codes = [g.new_empty(shape, dtype=parse_format(format).code_dtype) for shape in shapes]
    counts = operand_codes.scale_counts(g, across, down, whole)
    scales = [g.new_empty((count, 1), dtype=torch.float32) for count in counts]
    return codes[0], scales[0], codes[1], scales[1]


def _transposed(codes: Tensor) -> Tensor:
    if not dispatch.runs_triton(codes):
        return operand_codes.transposed(codes)
    from qat.kernels.operand_codes.transposed import transposed

    return transposed(codes)


_row_codes_of = operator(
    "row_codes(Tensor x, ScalarType scale_dtype, str format) -> (Tensor, Tensor)", _row_codes, _row_codes_fake
)
_gradient_codes_of = operator(
    "gradient_codes(Tensor g, Tensor? across, Tensor? down, Tensor? seed, ScalarType scale_dtype, str format, "
    "bool whole) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradient_codes,
    _gradient_codes_fake,
)
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
        elif rule == "absmax" and granularity != PerTensor() and ops.quantizes_in_triton(x, format):
            codes, scale = _row_codes_of(granularity.view(x.detach()), scale_dtype, format.name)
            return granularity.unview(codes, x.shape), QParams(scale.reshape(shape))
        else:
            qparams = ops.dynamic_qparams(x, rule, format, granularity, scale_dtype)
        return codes_to_multiply(x, qparams, format, granularity, stored), qparams

    return once_for_siblings(x, ("codes", rule, format.name, granularity, scale_dtype), computed)


def _left_to_a_compiler(x: Tensor, format: Format, stored: bool) -> bool:
    return torch.compiler.is_compiling() and not (stored and ops.quantizes_in_triton(x, format))


def gradient_codes(
    g: Tensor,
    across: Tensor | None,
    down: Tensor | None,
    format: Format,
    granularity: Granularity,
    scale_dtype: torch.dtype,
    stochastic: bool,
) -> GradientCodes:
    """Codes and scales of g * across for dgrad, and of (g * down)^T for wgrad.

    On a GPU kernels find them, under a compiler too, which would sum along tokens slowly. They draw from a seed that
    torch's generator draws, so that `torch.manual_seed` repeats them and nobody waits for the device. Elsewhere plain
    PyTorch does, which a compiler fuses.

    Args:
        g: `[tokens, out]`.
        across: float32, `[1, out]` or `[1, 1]`; None where dgrad takes no codes.
        down: float32, `[tokens, 1]` or `[1, 1]`; None where wgrad takes no codes.
        granularity: per token, which is a scale for each row of what is returned, or per tensor.
    """
    whole = granularity == PerTensor()
    if ops.quantizes_in_triton(g, format):
        seed = torch.randint(2**62, (1,), device=g.device) if stochastic else None
        return GradientCodes(*_gradient_codes_of(g, across, down, seed, scale_dtype, format.name, whole))
    noise = torch.rand(2, *g.shape, device=g.device) if stochastic else None
    return operand_codes.gradient_codes(g, across, down, noise, scale_dtype, format, whole)


def transposed_codes(codes: Tensor) -> Tensor:
    """`codes` `[rows, k]`, a byte each, as `[k, rows]`: contiguous on a GPU, elsewhere a view that a compiler fuses."""
    return _transposed_codes(codes) if dispatch.runs_triton(codes) else codes.T


def scaled_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """y = (decode(a) @ decode(b)^T) * s_a * s_b^T, `[rows of a, rows of b]` in `dtype`.

    No operator of its own: a compiler sees through it, and fuses the scales.
    """
    plain = dispatch.only_references() or (a.is_float and not a.codes.is_cuda)
    return (plain_product if plain else tensor_cores).scaled_product(a, b, dtype)
