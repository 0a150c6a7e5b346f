"""Codes of a gradient for both products of a backward pass: `reference.gradient_codes`.

One pass finds the extremes of rows and of columns, a second one the codes, of which it writes those along columns
transposed: an element is read twice and written twice. Extremes of parts meet in atomic maxima, which are the same in
every order, so that the same tensors give the same bits.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.grid import encode, grid_constants, inverse_of
from qat.kernels.fake_quantize.scales import covering_scale, storage_constants
from qat.kernels.fake_quantize.tiles import ceil_div, power_of_two, tile_at
from qat.kernels.launch import KEPT, Launch
from qat.kernels.operand_codes import reference
from qat.kernels.operand_codes.drawing import drawn_codes
from qat.kernels.operand_codes.reference import GradientCodes
from qat.kernels.operand_codes.tiles import NO_TABLE, TALL, WARPS, WIDE, noise_at
from qat.numerics.formats import Format

# Programs that fill a large GPU, and how many scales one of them finds.
_PROGRAMS, _SCALES = 512, 256


@triton.jit
def _factors(factor, at, count, step):
    """What multiplies each row or column `at`; `step` is 0 where all share it."""
    return tl.load(factor + at * step, mask=at < count, other=0)


@triton.jit
def _product_bits(x, factor):
    """|x * factor| by its bits; a magnitude is free where it is the operand of a product."""
    return (tl.abs(x) * tl.abs(factor)).to(tl.int32, bitcast=True)


@triton.jit
def _gradient_extremes(
    g,
    across,
    down,
    row_extremes,
    column_extremes,
    rows,
    columns,
    pieces,
    across_step,
    down_step,
    ACROSS: tl.constexpr,
    DOWN: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Greatest |g * across| of each row and |g * down| of each column, by their bits; with WHOLE of all of them."""
    first, piece = tl.program_id(0) // pieces * WIDTH, tl.program_id(0) % pieces
    column = first + tl.arange(0, WIDTH)
    along_rows, along_columns = tl.zeros((ROWS, WIDTH), dtype=tl.int32), tl.zeros((ROWS, WIDTH), dtype=tl.int32)
    for tile in range(STEPS):
        row = (piece * STEPS + tile) * ROWS + tl.arange(0, ROWS)
        at, inside = tile_at(row, first, rows, columns, WIDTH)
        own = tl.load(g + at, mask=inside, other=0).to(tl.float32)
        if ACROSS:
            bits = _product_bits(own, _factors(across, column, columns, across_step)[None, :])
            if WHOLE:
                along_rows = tl.maximum(along_rows, bits)
            else:
                tl.atomic_max(row_extremes + row, tl.max(bits, axis=1), mask=row < rows, sem="relaxed")
        if DOWN:
            bits = _product_bits(own, _factors(down, row, rows, down_step)[:, None])
            along_columns = tl.maximum(along_columns, bits)
    if ACROSS and WHOLE:
        tl.atomic_max(row_extremes, tl.max(tl.max(along_rows, axis=1), axis=0), sem="relaxed")
    if DOWN:
        extremes = tl.max(along_columns, axis=0)
        if WHOLE:
            tl.atomic_max(column_extremes, tl.max(extremes, axis=0), sem="relaxed")
        else:
            tl.atomic_max(column_extremes + column, extremes, mask=column < columns, sem="relaxed")


@triton.jit
def _gradient_scales(
    extremes,
    row_scale,
    column_scale,
    inverse,
    of_rows,
    count,
    high,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    extreme = tl.load(extremes + at, mask=at < count, other=0).to(tl.float32, bitcast=True)
    s = covering_scale(extreme, high, EPS, SMALLEST, LARGEST, STORAGE)
    tl.store(row_scale + at, s, mask=at < of_rows)
    tl.store(column_scale + at - of_rows, s, mask=(at >= of_rows) & (at < count))
    tl.store(inverse + at, inverse_of(s), mask=at < count)


@triton.jit
def _gradient_codes(
    g,
    across,
    down,
    seed,
    row_inverse,
    column_inverse,
    row_codes,
    column_codes,
    rows,
    columns,
    blocks,
    across_step,
    down_step,
    GRID: tl.constexpr,
    ACROSS: tl.constexpr,
    DOWN: tl.constexpr,
    WHOLE: tl.constexpr,
    DRAWN: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first, block = tl.program_id(0) // blocks * WIDTH, tl.program_id(0) % blocks
    row, column = block * ROWS + tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    at, inside = tile_at(row, first, rows, columns, WIDTH)
    own = tl.load(g + at, mask=inside, other=0).to(tl.float32)
    for_rows, for_columns = noise_at(tl.load(seed), row, first, columns, WIDTH) if DRAWN else (NO_TABLE, NO_TABLE)
    if ACROSS:
        v = own * _factors(across, column, columns, across_step)[None, :]
        v *= _factors(row_inverse, row, rows, 0 if WHOLE else 1)[:, None]
        code = drawn_codes(v, for_rows, first, GRID, WIDTH, QUADS) if DRAWN else encode(v, NO_TABLE, GRID)
        tl.store(row_codes + at, code.to(row_codes.dtype.element_ty), mask=inside)
    if DOWN:
        v = own * _factors(down, row, rows, down_step)[:, None]
        v *= _factors(column_inverse, column, columns, 0 if WHOLE else 1)[None, :]
        code = drawn_codes(v, for_columns, first, GRID, WIDTH, QUADS) if DRAWN else encode(v, NO_TABLE, GRID)
        at, inside = tile_at(column, block * ROWS, columns, rows, ROWS)
        tl.store(column_codes + at, tl.trans(code.to(column_codes.dtype.element_ty)), mask=inside)


def gradient_codes(
    g: Tensor,
    across: Tensor | None,
    down: Tensor | None,
    seed: Tensor | None,
    scale_dtype: torch.dtype,
    format: Format,
    whole: bool,
) -> GradientCodes:
    """As `reference.gradient_codes`; the noise follows from `seed` `[1]` int64, on the device of g."""
    if not g.numel():
        return reference.gradient_codes(g, across, down, None, scale_dtype, format, whole)
    rows, columns = g.shape
    of_rows, of_columns = reference.scale_counts(g, across, down, whole)
    extremes = torch.zeros(of_rows + of_columns, dtype=torch.int32, device=g.device)
    inverse = torch.empty_like(extremes, dtype=torch.float32)
    scales = [inverse.new_empty((count, 1)) for count in (of_rows, of_columns)]
    row_codes, column_codes = (
        torch.empty(shape, dtype=format.code_dtype, device=g.device)
        for shape in reference.codes_shapes(g, across, down)
    )
    operands = g.contiguous(), *(g if factor is None else factor.contiguous() for factor in (across, down))
    steps = [0 if factor is None or factor.numel() == 1 else 1 for factor in (across, down)]
    wanted = across is not None, down is not None, whole
    _extremes_ready(rows, columns, *steps, *wanted)(*operands, extremes, extremes[of_rows:])
    _scales_ready(of_rows, len(extremes), scale_dtype, format)(extremes, *scales, inverse)
    quads = columns % 16 == 0 and operands[0].data_ptr() % 16 == 0
    ready = _codes_ready(rows, columns, *steps, *wanted, format, seed is not None, quads)
    ready(*operands, g if seed is None else seed, inverse, inverse[of_rows:], row_codes, column_codes)
    return GradientCodes(row_codes, scales[0], column_codes, scales[1])


@lru_cache(KEPT)
def _extremes_ready(
    rows: int, columns: int, across_step: int, down_step: int, across: bool, down: bool, whole: bool
) -> Launch:
    blocks, strips = ceil_div(rows, TALL), ceil_div(columns, WIDE)
    each = power_of_two(ceil_div(blocks * strips, _PROGRAMS))
    pieces = ceil_div(blocks, each)
    constants = {"ACROSS": across, "DOWN": down, "WHOLE": whole, "ROWS": TALL, "WIDTH": WIDE, "STEPS": each}
    numbers = rows, columns, pieces, across_step, down_step
    return Launch(_gradient_extremes, pieces * strips, numbers, constants, WARPS)


@lru_cache(KEPT)
def _scales_ready(of_rows: int, count: int, scale_dtype: torch.dtype, format: Format) -> Launch:
    constants = storage_constants(scale_dtype) | {"WIDTH": _SCALES}
    return Launch(_gradient_scales, ceil_div(count, _SCALES), (of_rows, count, format.range()[1]), constants)


@lru_cache(KEPT)
def _codes_ready(
    rows: int,
    columns: int,
    across_step: int,
    down_step: int,
    across: bool,
    down: bool,
    whole: bool,
    format: Format,
    drawn: bool,
    quads: bool,
) -> Launch:
    blocks, strips = ceil_div(rows, TALL), ceil_div(columns, WIDE)
    constants: dict[str, Any] = {"GRID": grid_constants(format), "ACROSS": across, "DOWN": down, "WHOLE": whole}
    constants |= {"DRAWN": drawn, "QUADS": quads, "ROWS": TALL, "WIDTH": WIDE}
    numbers = rows, columns, blocks, across_step, down_step
    return Launch(_gradient_codes, blocks * strips, numbers, constants, WARPS)
