"""Scales and codes of columns, written as rows: `reference.column_codes`, to the bit where codes are the nearest.

One pass finds the extremes of each column in each of some pieces of its length, a second one the scale, from all
pieces, and the codes, which it writes transposed. Both read and write rows of a tile that are whole memory sectors. No
atomics, so that the same tensors give the same bits.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.grid import drawn, encode, grid_constants
from qat.kernels.fake_quantize.scales import covering_scale, storage_constants
from qat.kernels.fake_quantize.tiles import ceil_div, power_of_two, tile_at
from qat.kernels.launch import launch
from qat.kernels.operand_codes import reference
from qat.kernels.operand_codes.tiles import NO_TABLE, TALL, WARPS, WIDE, noise_at
from qat.numerics.formats import Format

# Programs that fill a large GPU, and the most pieces of a column: every program of the second pass reads them all.
_PROGRAMS, _PIECES = 512, 32


@triton.jit
def _scaled(x, factor, row, first, rows, columns, step, WIDE: tl.constexpr):
    """x * factor in a tile, float32, zero outside; `step` is 0 where all rows share a factor."""
    at, inside = tile_at(row, first, rows, columns, WIDE)
    own = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    return own * tl.load(factor + row * step, mask=row < rows, other=0)[:, None]


@triton.jit
def _column_extremes(
    x, factor, extremes, rows, columns, pieces, step, TALL: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr
):
    """max|x * factor| of each column in each piece, `[pieces, columns]`, by its bits, which keep NaN."""
    first, piece = tl.program_id(0) // pieces * WIDE, tl.program_id(0) % pieces
    most = tl.zeros((TALL, WIDE), dtype=tl.int32)
    for tile in range(STEPS):
        row = (piece * STEPS + tile) * TALL + tl.arange(0, TALL)
        own = _scaled(x, factor, row, first, rows, columns, step, WIDE)
        most = tl.maximum(most, own.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    column = first + tl.arange(0, WIDE)
    tl.store(extremes + piece * columns + column, tl.max(most, axis=0), mask=column < columns)


@triton.jit
def _column_codes(
    x,
    factor,
    seed,
    extremes,
    codes,
    scale,
    rows,
    columns,
    blocks,
    pieces,
    step,
    high,
    GRID: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    DRAWN: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
    PIECES: tl.constexpr,
):
    first, block = tl.program_id(0) // blocks * WIDE, tl.program_id(0) % blocks
    column = first + tl.arange(0, WIDE)
    at, inside = tile_at(tl.arange(0, PIECES), first, pieces, columns, WIDE)
    extreme = tl.max(tl.load(extremes + at, mask=inside, other=0), axis=0).to(tl.float32, bitcast=True)
    s = covering_scale(extreme, high, EPS, SMALLEST, LARGEST, STORAGE)
    tl.store(scale + column, s, mask=(column < columns) & (block == 0))
    row = block * TALL + tl.arange(0, TALL)
    own = _scaled(x, factor, row, first, rows, columns, step, WIDE)
    v = tl.div_rn(own, tl.broadcast_to(s[None, :], own.shape))
    code = drawn(v, noise_at(tl.load(seed), row, first, columns, WIDE), GRID) if DRAWN else encode(v, NO_TABLE, GRID)
    at, inside = tile_at(column, block * TALL, columns, rows, TALL)
    tl.store(codes + at, tl.trans(code.to(codes.dtype.element_ty)), mask=inside)


def column_codes(
    x: Tensor, factor: Tensor, seed: Tensor | None, scale_dtype: torch.dtype, format: Format
) -> tuple[Tensor, Tensor]:
    """As `reference.column_codes`; the noise follows from `seed` `[1]` int64, on the device of x."""
    rows, columns = x.shape
    if not x.numel():
        return reference.column_codes(x, factor, None, scale_dtype, format)
    x, factor, step = x.contiguous(), factor.contiguous(), 0 if factor.numel() == 1 else 1
    extremes = _extremes(x, factor, step)
    codes = torch.empty(columns, rows, dtype=format.code_dtype, device=x.device)
    scale = torch.empty(columns, 1, dtype=torch.float32, device=x.device)
    constants = {
        "GRID": grid_constants(format),
        **storage_constants(scale_dtype),
        "DRAWN": seed is not None,
        "TALL": TALL,
        "WIDE": WIDE,
        "PIECES": power_of_two(len(extremes)),
    }
    tensors = x, factor, x if seed is None else seed, extremes, codes, scale
    blocks = ceil_div(rows, TALL)
    sizes = rows, columns, blocks, len(extremes), step
    launch(_column_codes, blocks * ceil_div(columns, WIDE), (*tensors, *sizes, format.range()[1]), constants, WARPS)
    return codes, scale


def _extremes(x: Tensor, factor: Tensor, step: int) -> Tensor:
    """`[pieces, columns]` int32."""
    rows, columns = x.shape
    tiles, across = ceil_div(rows, TALL), ceil_div(columns, WIDE)
    steps = power_of_two(ceil_div(tiles, min(_PIECES, ceil_div(_PROGRAMS, across))))
    pieces = ceil_div(tiles, steps)
    extremes = torch.empty(pieces, columns, dtype=torch.int32, device=x.device)
    constants = {"TALL": TALL, "WIDE": WIDE, "STEPS": steps}
    launch(_column_extremes, across * pieces, (x, factor, extremes, rows, columns, pieces, step), constants, WARPS)
    return extremes
