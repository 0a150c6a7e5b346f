"""Codes of what a product multiplies, in plain PyTorch: the definition, and what a compiler fuses on a CPU.

Scales are symmetric: max|x| over the highest value of the grid, rounded up to what storage holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qat.numerics.dynamic import absmax_params
from qat.numerics.formats import Format
from qat.numerics.granularity import PerTensor, PerToken
from qat.numerics.qtensor import scale_down


class GradientCodes(NamedTuple):
    """A gradient `[rows, columns]` as both products of a backward pass take it; empty where one is not wanted.

    row_codes: `[rows, columns]`.
    row_scale: `[rows, 1]`, or `[1, 1]` with one scale for all.
    column_codes: `[columns, rows]`.
    column_scale: `[columns, 1]` or `[1, 1]`.
    """

    row_codes: Tensor
    row_scale: Tensor
    column_codes: Tensor
    column_scale: Tensor


def row_codes(x: Tensor, scale_dtype: torch.dtype, format: Format) -> tuple[Tensor, Tensor]:
    """Codes `[rows, k]` of x, and scales `[rows, 1]` rounded up to `scale_dtype`."""
    params = absmax_params(x, format, scale_dtype)
    return format.encode_(scale_down(x, params)).to(format.code_dtype), params.scale


def gradient_codes(
    g: Tensor,
    across: Tensor | None,
    down: Tensor | None,
    noise: Tensor | None,
    scale_dtype: torch.dtype,
    format: Format,
    whole: bool,
) -> GradientCodes:
    """Codes of g * across with a scale for each row, and of (g * down)^T with one for each column of g.

    Gradients do not ship, so here a scale divides by its inverse, which GPUs find once for a row: v = x * (1 / scale).

    Args:
        g: `[rows, columns]`.
        across: `[1, columns]` or `[1, 1]` float32; None wants no codes along rows.
        down: `[rows, 1]` or `[1, 1]` float32; None wants no codes along columns.
        noise: as `Format.encode` takes it, `[2, rows, columns]`, one for each product; None rounds to nearest.
        scale_dtype: what scales are rounded up to.
        format: integers or small floats.
        whole: whether all rows share a scale, and all columns another one.
    """
    for_rows, for_columns = (None, None) if noise is None else noise
    how = scale_dtype, format, whole
    return GradientCodes(*_codes(g, across, False, for_rows, *how), *_codes(g, down, True, for_columns, *how))


def codes_shapes(g: Tensor, across: Tensor | None, down: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `row_codes` and `column_codes`."""
    rows, columns = g.shape
    return (0,) if across is None else (rows, columns), (0,) if down is None else (columns, rows)


def scale_counts(g: Tensor, across: Tensor | None, down: Tensor | None, whole: bool) -> tuple[int, int]:
    """How many scales there are along rows and along columns."""
    rows, columns = (1, 1) if whole else g.shape
    return 0 if across is None else rows, 0 if down is None else columns


def _codes(
    g: Tensor,
    factor: Tensor | None,
    transpose: bool,
    noise: Tensor | None,
    scale_dtype: torch.dtype,
    format: Format,
    whole: bool,
) -> tuple[Tensor, Tensor]:
    if factor is None:
        return g.new_empty(0, dtype=format.code_dtype), g.new_empty((0, 1), dtype=torch.float32)
    x = g.to(torch.float32) * factor
    x, noise = (x.T, None if noise is None else noise.T) if transpose else (x, noise)
    view = (PerTensor() if whole else PerToken()).view(x)
    scale = absmax_params(view, format, scale_dtype).scale
    v = view * (torch.ones_like(scale) / scale)
    codes = format.encode_(v, None, None if noise is None else noise.reshape(v.shape)).to(format.code_dtype)
    return codes.view(x.shape).contiguous(), scale


def transposed(codes: Tensor) -> Tensor:
    """`codes` `[rows, k]` as `[k, rows]`, contiguous."""
    return codes.T.contiguous()
