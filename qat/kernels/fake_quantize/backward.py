"""The gradients of fake quantization in one pass; the equations stand in `reference.py`.

Nothing is kept from the forward pass but x and the qparams: finding a code again costs less than reading it. Sums over
a group are finished by the program that owns the group; where groups are few and long, by a sum over the programs that
share one. No atomics, so that the same tensors give the same bits.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize import reference
from qat.kernels.fake_quantize.grid import (
    ENTRIES,
    KIND,
    decode,
    encode,
    grid_constants,
    inverse_of,
    kept_nan,
    quotient,
    table_for,
)
from qat.kernels.fake_quantize.reference import Gradients
from qat.kernels.fake_quantize.tiles import of_rows, own_rows, power_of_two, table_of, tile_at, tiling
from qat.kernels.fake_quantize.triton import fields, per_table
from qat.kernels.launch import KEPT, Launch
from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams

TILE = 2048
# Programs that fill a large GPU.
_PROGRAMS = 1024


@triton.jit
def _members(code, share, total, entry, ENTRIES):
    """`total` `[ROWS, entries]` with the sum over each entry's members of `share` `[ROWS, WIDTH]` added to it."""
    for k in range(ENTRIES):
        part = tl.sum(tl.where(code == k, share, 0.0), axis=1, keep_dims=True)
        total = tl.where(entry == k, total + part, total)
    return total


@triton.jit
def _fake_quantize_backward(
    grad,
    x,
    x_hat,
    scale,
    zero_point,
    codebook,
    scale_grad,
    zero_point_grad,
    codebook_grad,
    rows,
    columns,
    pieces,
    per_table,
    low,
    high,
    GRID: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    CLIPS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_ZERO_POINT: tl.constexpr,
    NEED_CODEBOOK: tl.constexpr,
    NEED_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    TABLE: tl.constexpr,
):
    """A row is a group, or with GROUP > 0 the groups of that many elements that share a codebook."""
    row, piece = own_rows(pieces, ROWS)
    table = codebook
    if GRID[KIND] == "codebook":
        table = table_for(table_of(codebook, row, rows, per_table, GRID[ENTRIES]), GRID)
    s = of_rows(scale, row, rows, 1.0)
    inverse = inverse_of(s)
    if HAS_ZERO_POINT:
        z = of_rows(zero_point, row, rows, 0.0)
    scale_sum = tl.zeros((ROWS, 1), dtype=tl.float32)
    zero_point_sum = tl.zeros((ROWS, 1), dtype=tl.float32)
    entry = tl.arange(0, TABLE)[None, :]
    codebook_sum = tl.zeros((ROWS, TABLE), dtype=tl.float32)
    for step in range(STEPS):
        at, inside = tile_at(row, (piece * STEPS + step) * WIDTH, rows, columns, WIDTH)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        own = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        if GROUP > 0:
            own_scale = tl.load(scale + at // GROUP, mask=inside, other=1.0).to(tl.float32)
            v = tl.div_rn(own, own_scale)
        else:
            own_scale = s
            v = quotient(own, s, inverse)
        if HAS_ZERO_POINT:
            own_zero = tl.load(zero_point + at // GROUP, mask=inside, other=0.0).to(tl.float32) if GROUP > 0 else z
            v += own_zero
        code = encode(v, table, GRID)
        if NEED_VALUES or NEED_SCALE:
            value = decode(code, table, GRID)
            if HAS_ZERO_POINT:
                value -= own_zero
            value *= own_scale
        if NEED_VALUES:
            tl.store(x_hat + at, kept_nan(value, own).to(x_hat.dtype.element_ty), mask=inside)
        if NEED_CODEBOOK:
            share = tl.where(own == own, g * own_scale, 0.0)
            codebook_sum = _members(code, share, codebook_sum, entry, GRID[ENTRIES])
        clipped = g
        if CLIPS:
            clipped = tl.where((v >= low) & (v <= high), g, 0.0)
        if NEED_SCALE:
            scale_sum += tl.sum(g * value - clipped * own, axis=1, keep_dims=True)
        if NEED_ZERO_POINT:
            zero_point_sum += tl.sum(clipped - g, axis=1, keep_dims=True)
        if NEED_X:
            tl.store(grad + at, clipped.to(grad.dtype.element_ty), mask=inside)
    out = (piece * rows + row)[:, None]
    valid = (row < rows)[:, None]
    if NEED_SCALE:
        tl.store(scale_grad + out, scale_sum / s, mask=valid)
    if NEED_ZERO_POINT:
        tl.store(zero_point_grad + out, zero_point_sum * s, mask=valid)
    if NEED_CODEBOOK:
        tl.store(codebook_grad + out * GRID[ENTRIES] + entry, codebook_sum, mask=valid & (entry < GRID[ENTRIES]))


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor | None,
    x_hat: Tensor | None,
    needs: list[bool],
    params: ViewParams,
    format: Format,
) -> Gradients:
    """As `reference.fake_quantize_backward`; codes are not looked at."""
    if grad.numel() == 0:
        return reference.fake_quantize_backward(grad, x, codes, x_hat, needs, params, format)
    need_x, need_scale, need_zero_point, need_codebook = needs
    memory = grad.contiguous()
    shared = need_codebook and per_table(params, len(x)) > 1
    alone = [need_x, need_scale, need_zero_point, need_codebook and not shared]
    found = Gradients(*(grad.new_empty(0),) * 3)
    if shared:
        # Several groups to a codebook: sums over a group and over a codebook take a pass each.
        found = found._replace(codebook=_pass(memory, x, None, [False, False, False, True], params, format).codebook)
    if any(alone) or x_hat is not None:
        others = _pass(memory, x, x_hat, alone, params, format)
        found = others._replace(codebook=found.codebook) if shared else others
    if need_x and memory is not grad:
        grad.copy_(memory)
    return found


def _pass(
    grad: Tensor,
    x: Tensor,
    x_hat: Tensor | None,
    needs: list[bool],
    params: ViewParams,
    format: Format,
) -> Gradients:
    """One launch; with the gradient of a shared codebook, and no other, a row is all that shares one."""
    wanted, entries = (*needs, x_hat is not None), 0 if params.codebook is None else params.codebook.shape[1]
    sharing, has_zero_point = per_table(params, len(x)), params.zero_point is not None
    ready, rows, pieces = _ready(*x.shape, sharing, format, has_zero_point, entries, wanted)
    sums = [
        x.new_empty((pieces, rows, param.shape[1]) if need and param is not None else 0, dtype=torch.float32)
        for param, need in zip(params[:3], needs[1:], strict=True)
    ]
    ready(grad, x.contiguous(), x if x_hat is None else x_hat, *fields(params, x), *sums)
    return Gradients(*(total.sum(0) if len(total) > 1 else total[0] if len(total) else total for total in sums))


@lru_cache(KEPT)
def _ready(
    groups: int,
    elements: int,
    per_table: int,
    format: Format,
    has_zero_point: bool,
    entries: int,
    wanted: tuple[bool, ...],
) -> tuple[Launch, int, int]:
    """The launch, how many rows there are, and how many programs share each."""
    need_x, need_scale, need_zero_point, need_codebook, need_values = wanted
    sharing = per_table if need_codebook else 1
    rows, columns = groups // sharing, elements * sharing
    cut = tiling(rows, columns, TILE, _PROGRAMS)
    constants = {
        "GRID": grid_constants(format),
        "GROUP": elements if sharing > 1 else 0,
        "HAS_ZERO_POINT": has_zero_point,
        "CLIPS": format.saturates,
        "NEED_X": need_x,
        "NEED_SCALE": need_scale,
        "NEED_ZERO_POINT": need_zero_point,
        "NEED_CODEBOOK": need_codebook,
        "NEED_VALUES": need_values,
        "ROWS": cut.rows,
        "WIDTH": cut.width,
        "STEPS": cut.steps,
        "TABLE": power_of_two(entries) if need_codebook else 1,
    }
    numbers = rows, columns, cut.pieces, per_table // sharing, *format.range()
    return Launch(_fake_quantize_backward, cut.blocks * cut.pieces, numbers, constants), rows, cut.pieces
