"""Scales and codes of rows in one pass: `reference.row_codes`, to the bit where codes are the nearest."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.grid import drawn, encode, grid_constants
from qat.kernels.fake_quantize.scales import covering_scale, storage_constants
from qat.kernels.fake_quantize.tiles import power_of_two, tile_at, tiling
from qat.kernels.launch import launch
from qat.kernels.operand_codes import reference
from qat.kernels.operand_codes.tiles import NO_TABLE, noise_at
from qat.numerics.formats import Format

TILE = 2048
# Elements of a row that is read once; longer ones are read twice.
_MOST = 16384


@triton.jit
def _scaled(x, factor, at, inside, first, columns, step, HAS_FACTOR: tl.constexpr, WIDTH: tl.constexpr):
    """x * factor in a tile, float32; `step` is 0 where all columns share a factor."""
    own = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if HAS_FACTOR:
        column = first + tl.arange(0, WIDTH)
        own = own * tl.load(factor + column * step, mask=column < columns, other=0)[None, :]
    return own


@triton.jit
def _extreme(own):
    """max|x| of each row of a tile `[ROWS, 1]`, by its bits, which keep NaN."""
    return tl.max(own.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)


@triton.jit
def _store(own, s, out, seed, at, inside, row, first, columns, GRID, DRAWN: tl.constexpr, WIDTH: tl.constexpr):
    v = tl.div_rn(own, tl.broadcast_to(s, own.shape))
    code = drawn(v, noise_at(tl.load(seed), row, first, columns, WIDTH), GRID) if DRAWN else encode(v, NO_TABLE, GRID)
    tl.store(out + at, code.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_codes(
    x,
    factor,
    seed,
    codes,
    scale,
    rows,
    columns,
    step,
    high,
    GRID: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    DRAWN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = tile_at(row, 0, rows, columns, WIDTH)
    own = _scaled(x, factor, at, inside, 0, columns, step, HAS_FACTOR, WIDTH)
    extreme = _extreme(own)
    for tile in range(1, STEPS):
        at, inside = tile_at(row, tile * WIDTH, rows, columns, WIDTH)
        further = _scaled(x, factor, at, inside, tile * WIDTH, columns, step, HAS_FACTOR, WIDTH)
        extreme = tl.maximum(extreme, _extreme(further))
    s = covering_scale(extreme.to(tl.float32, bitcast=True), high, EPS, SMALLEST, LARGEST, STORAGE)
    tl.store(scale + row[:, None], s, mask=(row < rows)[:, None])
    at, inside = tile_at(row, 0, rows, columns, WIDTH)
    _store(own, s, codes, seed, at, inside, row, 0, columns, GRID, DRAWN, WIDTH)
    for tile in range(1, STEPS):
        at, inside = tile_at(row, tile * WIDTH, rows, columns, WIDTH)
        further = _scaled(x, factor, at, inside, tile * WIDTH, columns, step, HAS_FACTOR, WIDTH)
        _store(further, s, codes, seed, at, inside, row, tile * WIDTH, columns, GRID, DRAWN, WIDTH)


def row_codes(
    x: Tensor, factor: Tensor | None, seed: Tensor | None, scale_dtype: torch.dtype, format: Format
) -> tuple[Tensor, Tensor]:
    """As `reference.row_codes`; the noise follows from `seed` `[1]` int64, on the device of x."""
    rows, columns = x.shape
    if not x.numel():
        return reference.row_codes(x, factor, None, scale_dtype, format)
    codes = torch.empty(x.shape, dtype=format.code_dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    tile = TILE if columns > _MOST else max(TILE, power_of_two(columns))
    cut = tiling(rows, columns, tile, programs=1)
    width = max(8, cut.width)  # noise comes in eights
    constants = {
        "GRID": grid_constants(format),
        **storage_constants(scale_dtype),
        "HAS_FACTOR": factor is not None,
        "DRAWN": seed is not None,
        "ROWS": cut.rows,
        "WIDTH": width,
        "STEPS": cut.steps,
    }
    factors = x if factor is None else factor.contiguous()
    tensors = x.contiguous(), factors, x if seed is None else seed, codes, scale
    sizes = rows, columns, 0 if factors.numel() == 1 else 1
    launch(_row_codes, cut.blocks, (*tensors, *sizes, format.range()[1]), constants, max(4, min(16, width // 1024)))
    return codes, scale
