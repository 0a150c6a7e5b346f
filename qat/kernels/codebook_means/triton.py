"""One step of Lloyd's algorithm in one kernel: sums over the members of each entry, then the entries' new places.

A program reads the weights of one codebook once and keeps the sums of all entries in registers. Where codebooks are few
and long, each is cut into splits, whose sums a second kernel adds in their order. No atomics, so that the same weights
give the same bits.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.codebook_means.reference import LEFT, SHIFT

# Entries x weights in flight in a program: three float32 sums of each fit the registers of its warps.
_TILE = 2048
# Programs that fill a large GPU; rows fewer than these are split.
_PROGRAMS = 1024
_LEAST_PIECE = 4096


@triton.jit
def _ascending(table, k, ENTRIES: tl.constexpr):
    """The entries of one codebook in order, infinity after the last, and the place of each in memory."""
    entries = tl.load(table + k, mask=k < ENTRIES, other=float("inf"))
    # The bits of a positive float are in order already; those of a negative one are backwards below the sign.
    bits = entries.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = tl.sort((ordered.to(tl.int64) << 32) | k)
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), (keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _cell_sums(
    x,
    scale,
    importance,
    own,
    k,
    first,
    count,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Mass, moment and (if SQUARES) square of every entry over the `count` <= PIECE weights from `first` (int64) on."""
    below = tl.where(k > 0, tl.gather(own, tl.maximum(k - 1, 0), 0), float("-inf"))
    above = tl.gather(own, tl.minimum(k + 1, WIDTH - 1), 0)
    # Beyond the last entry there is nothing: an interval from infinity on.
    lowest = tl.where(k < ENTRIES, (below + own) / 2, float("inf"))
    highest = tl.where(k < ENTRIES - 1, (own + above) / 2, float("inf"))
    # Entries come first: a thread then holds its weights once, not once an entry.
    mass = tl.zeros((WIDTH, BLOCK), dtype=tl.float32)
    moment = tl.zeros((WIDTH, BLOCK), dtype=tl.float32)
    square = tl.zeros((WIDTH, BLOCK), dtype=tl.float32)
    # Offsets are small from here on, and divided by a constant.
    x += first
    importance += first
    scale += first // GROUP
    phase = (first % GROUP).to(tl.int32)
    if ONE_SCALE:
        s = tl.load(scale).to(tl.float32)
        lowest *= s
        highest *= s
    for offset in range(0, PIECE, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        inside = at < count
        # NaN, beyond the end, is in no interval.
        v = tl.load(x + at, mask=inside, other=float("nan")).to(tl.float32)
        if not ONE_SCALE:
            v /= tl.load(scale + (phase + at) // GROUP, mask=inside, other=1.0).to(tl.float32)
        member = (v[None, :] > lowest[:, None]) & (v[None, :] <= highest[:, None])
        if WEIGHTED:
            share = tl.load(importance + at, mask=inside, other=0.0).to(tl.float32)
            mass += tl.where(member, share[None, :], 0.0)
            moment += tl.where(member, (share * v)[None, :], 0.0)
        else:
            mass += tl.where(member, 1.0, 0.0)
            moment += tl.where(member, v[None, :], 0.0)
        if SQUARES:
            heavy = share * v * v if WEIGHTED else v * v
            square += tl.where(member, heavy[None, :], 0.0)
    if not ONE_SCALE:
        s = 1.0
    return tl.sum(mass, axis=1), tl.sum(moment, axis=1) / s, tl.sum(square, axis=1) / (s * s)


@triton.jit
def _moved(own, mass, moment, square, k, ENTRIES: tl.constexpr, SHIFT: tl.constexpr, LEFT: tl.constexpr):
    """The entries after the step, as the reference has them."""
    alive = mass > 0
    entries = tl.where(alive, moment / tl.where(alive, mass, 1.0), own)
    error = tl.where(alive, square - moment * entries, 0.0)
    dead = tl.where((k < ENTRIES) & (mass <= 0), 1, 0)
    while tl.sum(dead, axis=0) > 0:
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
    return entries


@triton.jit
def _step(
    x,
    scale,
    codebook,
    importance,
    sums,
    n,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPLIT: tl.constexpr,
    SHIFT: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Move the entries of one row; of a split row, write `sums[row, split]`, `[3, WIDTH]`, of one piece instead."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    k = tl.arange(0, WIDTH)
    own, place = _ascending(codebook + row * ENTRIES, k, ENTRIES)
    begin = split.to(tl.int64) * PIECE
    count = tl.minimum(n - begin, PIECE).to(tl.int32)
    first = row * n + begin
    mass, moment, square = _cell_sums(
        x, scale, importance, own, k, first, count, PIECE, GROUP, ENTRIES, WIDTH, BLOCK, ONE_SCALE, WEIGHTED, SPLIT
    )
    if SPLIT:
        out = sums + (row * tl.num_programs(1) + split) * 3 * WIDTH + k
        tl.store(out, mass)
        tl.store(out + WIDTH, moment)
        tl.store(out + 2 * WIDTH, square)
    else:
        # Squares are for dead entries, which are rare.
        if tl.sum(tl.where((k < ENTRIES) & (mass <= 0), 1, 0), axis=0) > 0:
            mass, moment, square = _cell_sums(
                x,
                scale,
                importance,
                own,
                k,
                first,
                count,
                PIECE,
                GROUP,
                ENTRIES,
                WIDTH,
                BLOCK,
                ONE_SCALE,
                WEIGHTED,
                True,
            )
        entries = _moved(own, mass, moment, square, k, ENTRIES, SHIFT, LEFT)
        tl.store(codebook + row * ENTRIES + place, entries, mask=k < ENTRIES)


@triton.jit
def _step_of_splits(
    sums,
    codebook,
    SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    LEFT: tl.constexpr,
):
    """Move the entries of one row by the sums of its splits."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    mass = tl.zeros((WIDTH,), dtype=tl.float32)
    moment = tl.zeros((WIDTH,), dtype=tl.float32)
    square = tl.zeros((WIDTH,), dtype=tl.float32)
    for split in range(SPLITS):
        part = sums + (row * SPLITS + split) * 3 * WIDTH + k
        mass += tl.load(part)
        moment += tl.load(part + WIDTH)
        square += tl.load(part + 2 * WIDTH)
    own, place = _ascending(codebook + row * ENTRIES, k, ENTRIES)
    entries = _moved(own, mass, moment, square, k, ENTRIES, SHIFT, LEFT)
    tl.store(codebook + row * ENTRIES + place, entries, mask=k < ENTRIES)


def lloyd_step_(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> None:
    """As `reference.lloyd_step_`."""
    rows, entries = codebook.shape
    n = x.numel() // rows
    width = max(2, triton.next_power_of_2(entries))
    splits = max(1, min(triton.cdiv(_PROGRAMS, rows), triton.cdiv(n, _LEAST_PIECE)))
    sums = torch.empty(rows, splits, 3, width, dtype=torch.float32, device=x.device) if splits > 1 else codebook
    x = x.contiguous()
    common = {"ENTRIES": entries, "WIDTH": width, "SHIFT": SHIFT, "LEFT": LEFT}
    with torch.cuda.device_of(x):
        _step[(rows, splits)](
            x,
            scale.contiguous(),
            codebook,
            x if importance is None else importance.contiguous(),
            sums,
            n,
            PIECE=triton.cdiv(n, splits),
            GROUP=x.shape[1],
            BLOCK=max(32, min(_TILE // width, triton.next_power_of_2(n))),
            num_warps=max(4, width // 16),
            ONE_SCALE=len(scale) == rows,
            WEIGHTED=importance is not None,
            SPLIT=splits > 1,
            **common,
        )
        if splits > 1:
            _step_of_splits[(rows,)](sums, codebook, SPLITS=splits, num_warps=1, **common)
