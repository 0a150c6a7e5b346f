"""Scales and codes of rows in one pass: `reference.row_codes`, to the bit."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.grid import encode, grid_constants, inverse_of, quotient
from qat.kernels.fake_quantize.scales import covering_scale, magnitude_bits, storage_constants
from qat.kernels.fake_quantize.tiles import tile_at, whole_groups
from qat.kernels.launch import KEPT, Launch
from qat.kernels.operand_codes import reference
from qat.kernels.operand_codes.tiles import NO_TABLE
from qat.numerics.formats import Format

TILE = 2048


@triton.jit
def _row_codes(
    x,
    codes,
    scale,
    rows,
    columns,
    high,
    GRID: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, inside = tile_at(row, 0, rows, columns, WIDTH)
    own = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    extreme = tl.max(magnitude_bits(own), axis=1, keep_dims=True)
    for tile in range(1, STEPS):
        at, inside = tile_at(row, tile * WIDTH, rows, columns, WIDTH)
        further = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        extreme = tl.maximum(extreme, tl.max(magnitude_bits(further), axis=1, keep_dims=True))
    s = covering_scale(extreme.to(tl.float32, bitcast=True), high, EPS, SMALLEST, LARGEST, STORAGE)
    inverse = inverse_of(s)
    tl.store(scale + row[:, None], s, mask=(row < rows)[:, None])
    at, inside = tile_at(row, 0, rows, columns, WIDTH)
    code = encode(quotient(own, s, inverse), NO_TABLE, GRID)
    tl.store(codes + at, code.to(codes.dtype.element_ty), mask=inside)
    for tile in range(1, STEPS):
        at, inside = tile_at(row, tile * WIDTH, rows, columns, WIDTH)
        further = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        code = encode(quotient(further, s, inverse), NO_TABLE, GRID)
        tl.store(codes + at, code.to(codes.dtype.element_ty), mask=inside)


def row_codes(x: Tensor, scale_dtype: torch.dtype, format: Format) -> tuple[Tensor, Tensor]:
    """As `reference.row_codes`."""
    rows, columns = x.shape
    if not x.numel():
        return reference.row_codes(x, scale_dtype, format)
    codes = torch.empty(x.shape, dtype=format.code_dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _ready(rows, columns, scale_dtype, format)(x.contiguous(), codes, scale)
    return codes, scale


@lru_cache(KEPT)
def _ready(rows: int, columns: int, scale_dtype: torch.dtype, format: Format) -> Launch:
    cut, warps = whole_groups(rows, columns, TILE)
    constants = {
        "GRID": grid_constants(format),
        **storage_constants(scale_dtype),
        "ROWS": cut.rows,
        "WIDTH": cut.width,
        "STEPS": cut.steps,
    }
    numbers = rows, columns, format.range()[1]
    return Launch(_row_codes, cut.blocks, numbers, constants, warps)
