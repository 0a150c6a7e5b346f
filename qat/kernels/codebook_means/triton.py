"""One step of Lloyd's algorithm in two kernels: sums over the members of each entry, then the entries' new places.

The first reads every weight once and keeps the sums of all entries in registers; few long rows are cut into splits,
whose sums the second adds in order. No atomics, so that the same weights give the same bits.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.codebook_means.reference import LEFT, SHIFT

# Weights x entries in flight in a program: three float32 sums of each fit the registers of four warps.
_TILE = 2048
# Programs that fill a large GPU; rows fewer than these are split.
_PROGRAMS = 1024
_LEAST_PIECE = 4096


@triton.jit
def _cell_sums(
    x,
    scale,
    codebook,
    importance,
    sums,
    n,
    elements,
    piece,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """`sums[row, split]` = mass, moment and square of every entry, `[3, WIDTH]`, over one piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    k = tl.arange(0, WIDTH)
    table = codebook + row * ENTRIES
    own = tl.load(table + k, mask=k < ENTRIES, other=float("inf"))
    below = tl.load(table + k - 1, mask=(k > 0) & (k < ENTRIES), other=float("-inf"))
    above = tl.load(table + k + 1, mask=k < ENTRIES - 1, other=float("inf"))
    lowest = (below + own) / 2
    highest = (own + above) / 2
    # Beyond the last entry there is nothing: an interval from infinity on.
    lowest = tl.where(k < ENTRIES, lowest, float("inf"))
    mass = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    moment = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    square = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    begin = split.to(tl.int64) * piece
    end = tl.minimum(begin + piece, n)
    for offset in range(begin, end, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        inside = at < end
        flat = row * n + at
        v = tl.load(x + flat, mask=inside, other=0.0).to(tl.float32)
        v = v / tl.load(scale + flat // elements, mask=inside, other=1.0)
        member = (v[:, None] > lowest[None, :]) & (v[:, None] <= highest[None, :]) & inside[:, None]
        if WEIGHTED:
            share = tl.load(importance + flat, mask=inside, other=0.0).to(tl.float32)
            weight = tl.where(member, share[:, None], 0.0)
        else:
            weight = tl.where(member, 1.0, 0.0)
        mass += weight
        moment += weight * v[:, None]
        square += weight * (v * v)[:, None]
    out = sums + (row * tl.num_programs(1) + split) * 3 * WIDTH + k
    tl.store(out, tl.sum(mass, axis=0))
    tl.store(out + WIDTH, tl.sum(moment, axis=0))
    tl.store(out + 2 * WIDTH, tl.sum(square, axis=0))


@triton.jit
def _moved_entries(
    sums,
    codebook,
    moved,
    splits,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    LEFT: tl.constexpr,
):
    """The entries of one row after the step, as `reference.lloyd_step` has them."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    mass = tl.zeros((WIDTH,), dtype=tl.float32)
    moment = tl.zeros((WIDTH,), dtype=tl.float32)
    square = tl.zeros((WIDTH,), dtype=tl.float32)
    for split in range(splits):
        part = sums + (row * splits + split) * 3 * WIDTH + k
        mass += tl.load(part)
        moment += tl.load(part + WIDTH)
        square += tl.load(part + 2 * WIDTH)
    real = k < ENTRIES
    before = tl.load(codebook + row * ENTRIES + k, mask=real, other=0.0)
    alive = mass > 0
    entries = tl.where(alive, moment / tl.where(alive, mass, 1.0), before)
    error = tl.where(alive, square - moment * entries, 0.0)
    dead = tl.where(real & (mass <= 0), 1, 0)
    for _ in range(tl.sum(dead, axis=0)):
        largest = tl.max(error, axis=0)
        worst = tl.argmax(error, axis=0)
        first = tl.argmax(dead, axis=0)
        heap = tl.sum(tl.where(k == worst, mass, 0.0), axis=0)
        centre = tl.sum(tl.where(k == worst, entries, 0.0), axis=0)
        # Without error there is nothing to split, and the dead entry stays.
        low = tl.where(k == worst, largest, 0.0) > 0
        high = tl.where(k == first, largest, 0.0) > 0
        shift = SHIFT * tl.sqrt(tl.maximum(largest, 0.0) / tl.maximum(heap, 1e-30))
        entries = tl.where(high, centre + shift, tl.where(low, centre - shift, entries))
        mass = tl.where(low | high, heap / 2, mass)
        error = tl.where(low | high, largest * LEFT, error)
        dead = tl.where(k == first, 0, dead)
    tl.store(moved + row * ENTRIES + k, entries, mask=real)


def lloyd_step(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> Tensor:
    """As `reference.lloyd_step`."""
    x, codebook = x.contiguous(), codebook.contiguous()
    rows, entries = codebook.shape
    n = x.numel() // rows
    width = max(2, triton.next_power_of_2(entries))
    splits = max(1, min(triton.cdiv(_PROGRAMS, rows), triton.cdiv(n, _LEAST_PIECE)))
    piece = triton.cdiv(n, splits)
    sums = torch.empty(rows, splits, 3, width, dtype=torch.float32, device=x.device)
    moved = torch.empty_like(codebook)
    weights = x if importance is None else importance.contiguous()
    sizes = {"ENTRIES": entries, "WIDTH": width}
    _cell_sums[(rows, splits)](
        x,
        scale.contiguous(),
        codebook,
        weights,
        sums,
        n,
        x.shape[1],
        piece,
        BLOCK=max(16, _TILE // width),
        WEIGHTED=importance is not None,
        **sizes,
    )
    _moved_entries[(rows,)](sums, codebook, moved, splits, SHIFT=SHIFT, LEFT=LEFT, num_warps=1, **sizes)
    return moved
