"""Fake quantization, codes and their values in one pass over memory each, for scales that are given.

The arithmetic is that of `qat.numerics.qtensor`, in float32 with divisions rounded to nearest: the same bits.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.grid import (
    ENTRIES,
    KIND,
    decode,
    encode,
    grid_constants,
    inverse_of,
    kept_nan,
    nearest,
    quotient,
    read,
    table_for,
)
from qat.kernels.fake_quantize.tiles import of_rows, own_rows, table_of, tile_at, tiling
from qat.kernels.launch import KEPT, Launch
from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams

TILE = 2048


@triton.jit
def _fake_quantize(
    source,
    out,
    scale,
    zero_point,
    codebook,
    groups,
    elements,
    pieces,
    per_table,
    GRID: tl.constexpr,
    ENCODE: tl.constexpr,
    DECODE: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, piece = own_rows(pieces, ROWS)
    at, inside = tile_at(row, piece * WIDTH, groups, elements, WIDTH)
    table = codebook
    if GRID[KIND] == "codebook":
        table = table_for(table_of(codebook, row, groups, per_table, GRID[ENTRIES]), GRID)
    s = of_rows(scale, row, groups, 1.0)
    if HAS_ZERO_POINT:
        z = of_rows(zero_point, row, groups, 0.0)
    found = tl.load(source + at, mask=inside, other=0)
    if ENCODE:
        own = found.to(tl.float32)
        v = quotient(own, s, inverse_of(s))
        if HAS_ZERO_POINT:
            v += z
        found = nearest(v, table, GRID) if DECODE else encode(v, table, GRID)
    else:
        found = decode(read(found, GRID), table, GRID)
    if DECODE:
        value = found
        if HAS_ZERO_POINT:
            value -= z
        found = value * s
        if ENCODE:
            found = kept_nan(found, own)
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


def quantize(x: Tensor, params: ViewParams, format: Format) -> Tensor:
    """As `reference.quantize`."""
    codes = torch.empty(x.shape, dtype=format.code_dtype, device=x.device)
    return _launch(x, codes, params, format, encodes=True, decodes=False)


def dequantize(codes: Tensor, out: Tensor, params: ViewParams, format: Format) -> None:
    """As `reference.dequantize`."""
    _launch(codes, out, params, format, encodes=False, decodes=True)


def fake_quantize(x: Tensor, out: Tensor, params: ViewParams, format: Format) -> None:
    """As `reference.fake_quantize`, without codes on the way."""
    _launch(x, out, params, format, encodes=True, decodes=True)


def _launch(source: Tensor, out: Tensor, params: ViewParams, format: Format, encodes: bool, decodes: bool) -> Tensor:
    if source.numel() == 0:
        return out
    memory = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    sharing, has_zero_point = per_table(params, len(source)), params.zero_point is not None
    ready = _ready(*source.shape, sharing, format, has_zero_point, encodes, decodes)
    ready(source.contiguous(), memory, *fields(params, source))
    return out if memory is out else out.copy_(memory)


@lru_cache(KEPT)
def _ready(
    groups: int, elements: int, per_table: int, format: Format, has_zero_point: bool, encodes: bool, decodes: bool
) -> Launch:
    cut = tiling(groups, elements, TILE)
    constants = {
        "GRID": grid_constants(format),
        "ENCODE": encodes,
        "DECODE": decodes,
        "HAS_ZERO_POINT": has_zero_point,
        "ROWS": cut.rows,
        "WIDTH": cut.width,
    }
    return Launch(_fake_quantize, cut.blocks * cut.pieces, (groups, elements, cut.pieces, per_table), constants)


def fields(params: ViewParams, absent: Tensor) -> list[Tensor]:
    """Scale, zero point and codebook as kernels take them; `absent` stands for what is not there and not read."""
    return [absent if param is None else aligned(param.contiguous()) for param in params[:3]]


def aligned(param: Tensor) -> Tensor:
    """`param`, or a copy where it begins within 8 bytes: entries of a codebook are read in pairs."""
    return param if param.data_ptr() % 8 == 0 else param.clone()


def per_table(params: ViewParams, groups: int) -> int:
    """How many groups share a codebook."""
    return 1 if params.codebook is None else groups // len(params.codebook)
