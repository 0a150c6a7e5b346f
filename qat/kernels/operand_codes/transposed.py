"""Codes of a byte each, transposed in tiles."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.tiles import ceil_div, tile_at
from qat.kernels.launch import KEPT, Launch

# Of a tile, and its warps.
_SIDE, _WARPS = 128, 8


@triton.jit
def _transposed_codes(codes, out, rows, columns, across, SIDE: tl.constexpr):
    down, right = tl.program_id(0) // across * SIDE, tl.program_id(0) % across * SIDE
    at, inside = tile_at(down + tl.arange(0, SIDE), right, rows, columns, SIDE)
    found = tl.load(codes + at, mask=inside, other=0)
    at, inside = tile_at(right + tl.arange(0, SIDE), down, columns, rows, SIDE)
    tl.store(out + at, tl.trans(found), mask=inside)


def transposed(codes: Tensor) -> Tensor:
    """As `reference.transposed`."""
    rows, columns = codes.shape
    out = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    if codes.numel():
        _ready(rows, columns)(codes.contiguous(), out)
    return out


@lru_cache(KEPT)
def _ready(rows: int, columns: int) -> Launch:
    across = ceil_div(columns, _SIDE)
    programs = ceil_div(rows, _SIDE) * across
    return Launch(_transposed_codes, programs, (rows, columns, across), {"SIDE": _SIDE}, _WARPS)
