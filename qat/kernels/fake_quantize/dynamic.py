"""Scales that follow from the data, found and used in one kernel: what `qat.numerics.dynamic` computes, to the bit.

A group is read once where it fits a tile, otherwise twice, the second time mostly from the cache.
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
    grid_constants,
    inverse_of,
    kept_nan,
    nearest,
    quotient,
    table_for,
    whole,
)
from qat.kernels.fake_quantize.scales import (
    at_least,
    at_most,
    covering_scale,
    magnitude_bits,
    rounded_up,
    storage_constants,
)
from qat.kernels.fake_quantize.tiles import table_of, tile_at, whole_groups
from qat.kernels.fake_quantize.triton import aligned
from qat.kernels.launch import KEPT, Launch
from qat.numerics.formats import FloatFormat, Format

RULES = ("absmax", "minmax", "microscaling")
# Elements of a program that has many short groups.
TILE = 1024
# Elements of a group that is worth a program of its own; longer ones are where there are so many.
_MOST, _ENOUGH = 16384, 256


@triton.jit
def _ordered(bits):
    """Bits of a float32 to an integer in the order of the numbers, and back; NaN comes first or last."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _extremes(x, inside, least, most, RULE: tl.constexpr):
    """`least` and `most` `[ROWS, 1]`, ordered integers, and those of the tile `x`. Integers, because they keep NaN.

    Other rules than `minmax` ask for the greatest magnitude only, and for `x` that is 0 outside the tile.
    """
    if RULE == "minmax":
        bits = _ordered(x.to(tl.int32, bitcast=True))
        least = tl.minimum(least, tl.min(tl.where(inside, bits, 0x7FFFFFFF), axis=1, keep_dims=True))
        most = tl.maximum(most, tl.max(tl.where(inside, bits, -0x7FFFFFFF), axis=1, keep_dims=True))
    else:
        most = tl.maximum(most, tl.max(magnitude_bits(x), axis=1, keep_dims=True))
    return least, most


@triton.jit
def _params(
    least,
    most,
    low,
    high,
    RULE: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Scale and zero point `[ROWS, 1]` from the extremes of each group."""
    largest = _ordered(most).to(tl.float32, bitcast=True)  # of a magnitude the integer is the number's bits
    zero_point = tl.zeros_like(largest)
    if RULE == "minmax":
        smallest = _ordered(least).to(tl.float32, bitcast=True)
        smallest, largest = at_most(smallest, 0.0), at_least(largest, 0.0)
        steps = tl.zeros_like(smallest) + (high - low)
        scale = rounded_up(tl.div_rn(largest - smallest, steps), EPS, SMALLEST, LARGEST, STORAGE)
        zero_point = at_most(at_least(whole(low - tl.div_rn(smallest, scale)), low), high)
    elif RULE == "absmax":
        scale = covering_scale(largest, high, EPS, SMALLEST, LARGEST, STORAGE)
    else:
        exponent = tl.minimum(tl.maximum((most >> 23) - 127 - EXPONENT, -126), 127)
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return scale, zero_point


@triton.jit
def _on_grid(x, s, inverse, z, table, GRID: tl.constexpr, RULE: tl.constexpr):
    v = quotient(x, s, inverse)
    if RULE == "minmax":
        v += z
    value = nearest(v, table, GRID)
    if RULE == "minmax":
        value -= z
    return kept_nan(value * s, x)


@triton.jit
def _fake_quantize_dynamic(
    x,
    out,
    scale_out,
    zero_point_out,
    codebook,
    groups,
    elements,
    per_table,
    low,
    high,
    GRID: tl.constexpr,
    RULE: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    EXPONENT: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """With VALUES, fake-quantize; otherwise only write the scales and zero points."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    least = tl.full((ROWS, 1), 0x7FFFFFFF, dtype=tl.int32)
    most = tl.full((ROWS, 1), -0x7FFFFFFF, dtype=tl.int32)
    at, inside = tile_at(row, 0, groups, elements, WIDTH)
    own = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    least, most = _extremes(own, inside, least, most, RULE)
    for step in range(1, STEPS):
        at, inside = tile_at(row, step * WIDTH, groups, elements, WIDTH)
        further = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        least, most = _extremes(further, inside, least, most, RULE)
    s, z = _params(least, most, low, high, RULE, EPS, SMALLEST, LARGEST, STORAGE, EXPONENT)
    if VALUES:
        inverse = inverse_of(s)
        table = codebook
        if GRID[KIND] == "codebook":
            table = table_for(table_of(codebook, row, groups, per_table, GRID[ENTRIES]), GRID)
        at, inside = tile_at(row, 0, groups, elements, WIDTH)
        value = _on_grid(own, s, inverse, z, table, GRID, RULE)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
        for step in range(1, STEPS):
            at, inside = tile_at(row, step * WIDTH, groups, elements, WIDTH)
            further = tl.load(x + at, mask=inside, other=0).to(tl.float32)
            value = _on_grid(further, s, inverse, z, table, GRID, RULE)
            tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
    else:
        valid = (row < groups)[:, None]
        tl.store(scale_out + row[:, None], s, mask=valid)
        if RULE == "minmax":
            tl.store(zero_point_out + row[:, None], z, mask=valid)


def takes(x: Tensor, rule: str) -> bool:
    """Whether there is a kernel for `rule`, and enough groups of `x` `[groups, elements]` for a program each."""
    return rule in RULES and x.numel() > 0 and (x.shape[1] <= _MOST or len(x) >= _ENOUGH)


def fake_quantize(
    x: Tensor, out: Tensor, rule: str, scale_dtype: torch.dtype, codebook: Tensor | None, format: Format
) -> None:
    """Write what `x` `[groups, elements]` is on the grid whose scales follow from x by one of RULES to `out`."""
    memory = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    _launch(x, memory, x, x, codebook, rule, scale_dtype, format, values=True)
    if memory is not out:
        out.copy_(memory)


def params(x: Tensor, rule: str, scale_dtype: torch.dtype, format: Format) -> tuple[Tensor, Tensor]:
    """Scales `[groups, 1]` by one of RULES and, where that is `minmax`, zero points."""
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    zero_point = torch.empty_like(scale) if rule == "minmax" else scale.new_empty(0)
    _launch(x, x, scale, zero_point, None, rule, scale_dtype, format, values=False)
    return scale, zero_point


def _launch(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    codebook: Tensor | None,
    rule: str,
    scale_dtype: torch.dtype,
    format: Format,
    values: bool,
) -> None:
    sharing = 1 if codebook is None else len(x) // len(codebook)
    table = x if codebook is None else aligned(codebook.contiguous())
    ready = _ready(*x.shape, sharing, rule, scale_dtype, format, values)
    ready(x.contiguous(), out, scale, zero_point, table)


@lru_cache(KEPT)
def _ready(
    groups: int, elements: int, per_table: int, rule: str, scale_dtype: torch.dtype, format: Format, values: bool
) -> Launch:
    cut, warps = whole_groups(groups, elements, TILE)
    constants = {
        "GRID": grid_constants(format),
        "RULE": rule,
        **storage_constants(scale_dtype),
        "EXPONENT": format.largest_exponent if isinstance(format, FloatFormat) else 0,
        "VALUES": values,
        "ROWS": cut.rows,
        "WIDTH": cut.width,
        "STEPS": cut.steps,
    }
    numbers = groups, elements, per_table, *format.range()
    return Launch(_fake_quantize_dynamic, cut.blocks, numbers, constants, warps)
