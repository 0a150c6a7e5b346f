"""`skinny.py` with its codes on the way in shared memory instead of registers.

Each lane copies its own 16 bytes of the chunks of a step, and its scales, into a ring of STAGES slots (cp.async), and
reads nothing else from it: so it waits for its own copies and for no other lane, without a barrier. Loads in flight
hold no registers, more warps fit a processor, and ptxas cannot move a copy. For the few steps of a small weight the
ring is hardly filled before it is emptied, and `skinny.py` is faster.

Shared memory is declared by the assembly itself, because Triton gives none that a program could address. What is
declared so and what Triton takes for itself must stay below 48 KiB together.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# Tuples of tensors grow by sums, which is what its compiler knows.
# ruff: noqa: N803, RUF005
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

from typing import Any

import triton
import triton.language as tl

from qat.errors import InputError
from qat.kernels.quantized_linear.choice import CHUNK_BYTES, RING_BYTES, ring_bytes, slot_bytes
from qat.kernels.quantized_linear.launches import Ring
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.skinny import SUMS, no_totals, of_rows, store_totals, x_of_step
from qat.kernels.quantized_linear.step import Assembly, words_of_scales, words_of_zeros
from qat.kernels.quantized_linear.tiles import STEP_COLUMNS, chunks_of_row


def constants_of(layout: Layout, wide_scales: bool, how: Ring) -> dict[str, Any]:
    """Compile-time constants of `ring` besides those of `skinny`.

    Raises:
        InputError: if the ring is larger than shared memory.
    """
    if ring_bytes(layout, wide_scales, how) > RING_BYTES:
        raise InputError(f"{how} needs {ring_bytes(layout, wide_scales, how)} bytes of {RING_BYTES}: take fewer warps.")
    lanes, copying = lane_addresses(layout, wide_scales, how), copies(layout, wide_scales)
    return {
        "LANE_TEXT": lanes.text,
        "LANE_CONSTRAINTS": lanes.constraints,
        "COPY_TEXT": copying.text,
        "COPY_CONSTRAINTS": copying.constraints,
        "SLOT": slot_bytes(layout, wide_scales),
        "STAGES": how.stages,
    }


def lane_addresses(layout: Layout, wide_scales: bool, how: Ring) -> Assembly:
    """Where a lane finds its own: the first slot, codes, scales, zero points, and the first step of its warp.

    Operands: results as above (32, 64, 64, 64, 32 bits), then the addresses of the codes, scales and zero points of the
    program, the first of its rows of tiles, and the last that there is.
    """
    steps, bytes = -(-layout.columns // STEP_COLUMNS), slot_bytes(layout, wide_scales) * how.stages
    strides = (
        (CHUNK_BYTES * chunks_of_row(layout.columns, layout.bits), CHUNK_BYTES * layout.bits, 16, "l"),
        *((32 * steps * words, 32 * words, 4 * words, "g") for words in (words_of_scales(layout, wide_scales),)),
        *((32 * steps * words, 32 * words, 4 * words, "g") for words in (words_of_zeros(layout) * bool(layout.group),)),
    )
    lines = [
        f".shared .align 128 .b8 qat_ring[{bytes * how.warps}];",
        "{",
        ".reg .b32 t, l, g, w, k, tile, o;",
        ".reg .b64 d;",
        *("mov.u32 t, %tid.x;", "and.b32 l, t, 31;", "shr.u32 g, l, 2;", "shr.u32 w, t, 5;"),
        *("mov.u32 o, qat_ring;", f"mad.lo.u32 o, w, {bytes}, o;", "mad.lo.u32 $0, l, 16, o;"),
        *(f"rem.u32 k, w, {how.warps_k};", f"div.u32 w, w, {how.warps_k};", "mov.u32 $4, k;"),
        # Rows that do not exist read those of the last; they are not stored.
        *("add.u32 tile, w, $8;", "min.s32 tile, tile, $9;"),
    ]
    for i, (row, step, lane, which) in enumerate(strides):
        lines += [
            *(f"mul.wide.u32 d, tile, {row};", f"add.s64 ${1 + i}, ${5 + i}, d;"),
            *(f"mul.lo.u32 o, k, {step};", f"mad.lo.u32 o, {which}, {lane}, o;"),
            *("cvt.u64.u32 d, o;", f"add.s64 ${1 + i}, ${1 + i}, d;"),
        ]
    return Assembly("\n".join([*lines, "}"]), "=&r,=&l,=&l,=&l,=&r,l,l,l,r,r")


def copies(layout: Layout, wide_scales: bool) -> Assembly:
    """A lane's copies of a step; what is not there becomes zeros.

    Operands: a result without meaning; the slot; codes, scales and zero points of the step; how many chunks there are
    from the first of this step on.
    """
    lines = ["{", ".reg .pred p;", ".reg .b32 size;"]
    for chunk in range(layout.bits):
        lines += [
            *(f"setp.gt.s32 p, $5, {chunk};", "selp.b32 size, 16, 0, p;"),
            f"cp.async.cg.shared.global [$1+{CHUNK_BYTES * chunk}], [$2+{CHUNK_BYTES * chunk}], 16, size;",
        ]
    lines.append("setp.gt.s32 p, $5, 0;")
    at = layout.bits
    for operand, words in ((3, words_of_scales(layout, wide_scales)), (4, words_of_zeros(layout) * bool(layout.group))):
        for first in range(0, words, 4):
            size = 4 * min(4, words)
            lines += [
                f"selp.b32 size, {size}, 0, p;",
                f"cp.async.ca.shared.global [$1+{CHUNK_BYTES * at}], [${operand}+{4 * first}], {size}, size;",
            ]
            at += 1
    return Assembly("\n".join([*lines, "cp.async.commit_group;", "mov.u32 $0, 0;", "}"]), "=r,r,l,l,l,r")


@triton.jit
def _copy(
    slot,
    codes,
    scale,
    zero,
    first,
    turn,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    WARPS_K: tl.constexpr,
):
    """Begin the copies of the warp's step `turn`."""
    step = turn * WARPS_K
    left = CHUNKS - (first + step) * BITS
    codes += step.to(tl.int64) * (BITS * 512)
    scale += step.to(tl.int64) * (SCALE_WORDS * 32)
    zero += step.to(tl.int64) * (ZERO_WORDS * 32)
    return tl.inline_asm_elementwise(
        TEXT, CONSTRAINTS, [slot, codes, scale, zero, left], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["tokens", "rows", "tile_rows", "stride"])
def ring(
    x,
    codes,
    scale,
    zero,
    table,
    bias,
    y,
    tokens,
    rows,
    tile_rows,
    stride,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LANE_TEXT: tl.constexpr,
    LANE_CONSTRAINTS: tl.constexpr,
    COPY_TEXT: tl.constexpr,
    COPY_CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WARPS_K: tl.constexpr,
    EVEN: tl.constexpr,
    SLOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `skinny.skinny`; SLOT bytes are a slot of a warp's ring, of which there are STAGES."""
    mine: tl.constexpr = (STEPS + WARPS_K - 1) // WARPS_K
    # Scalars to Triton; in fact each lane has its own.
    slot, own_codes, own_scale, own_zero, start = tl.inline_asm_elementwise(
        LANE_TEXT,
        LANE_CONSTRAINTS,
        [
            codes.to(tl.int64, bitcast=True),
            scale.to(tl.int64, bitcast=True),
            zero.to(tl.int64, bitcast=True),
            tl.program_id(0) * (WARPS // WARPS_K),
            tile_rows - 1,
        ],
        dtype=(tl.int32, tl.int64, tl.int64, tl.int64, tl.int32),
        is_pure=False,
        pack=1,
    )
    zero_words: tl.constexpr = ZERO_WORDS if SCALE_WORDS else 0
    for stage in tl.static_range(STAGES):
        turn = tl.full([], stage, tl.int32)
        _copy(
            slot + stage * SLOT, own_codes, own_scale, own_zero, start, turn,
            COPY_TEXT, COPY_CONSTRAINTS, BITS, CHUNKS, SCALE_WORDS, zero_words, WARPS_K,
        )  # fmt: skip
    e = tl.arange(0, 128 * WARPS)
    g, t, r, warp = e // 16 % 8, e // 4 % 4, e % 4, e // 128
    first, tile = warp % WARPS_K, tl.program_id(0) * (WARPS // WARPS_K) + warp // WARPS_K
    tile = tl.minimum(tile, tile_rows - 1)
    others = of_rows(table, zero, tile, g, e, SCALE_WORDS, ZERO_WORDS, TABLE_WORDS, ONE_TABLE)
    totals = no_totals(TOKEN_TILES, WARPS)
    for turn in range(mine):
        own_x = x_of_step(x, g, t, r, first + turn * WARPS_K, tokens, stride, TOKEN_TILES, WORDS, not EVEN)
        tl.inline_asm_elementwise(
            f"cp.async.wait_group {STAGES - 1}; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        here = slot + turn % STAGES * SLOT
        totals = tl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, totals + (here,) + own_x + others, dtype=SUMS[TOKEN_TILES], is_pure=False, pack=4
        )
        _copy(
            here, own_codes, own_scale, own_zero, start, turn + STAGES,
            COPY_TEXT, COPY_CONSTRAINTS, BITS, CHUNKS, SCALE_WORDS, zero_words, WARPS_K,
        )  # fmt: skip
    store_totals(totals, scale, bias, y, tokens, rows, TOKEN_TILES, WARPS, WARPS_K, SCALE_WORDS == 0, HAS_BIAS)
