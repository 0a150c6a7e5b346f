"""Attention of a few queries to keys and values that are stored as codes: the kernels.

    out = softmax(scaling * q K_hat^T + mask) V_hat,    K_hat, V_hat = (code - zero point) * scale

A program is one warp: it attends all query heads of a key head to one stretch of the sequence, reads every code once,
and leaves a sum, its largest score and its mass for `add_parts`, which adds the stretches in their order. This is
flash-decoding (Dao et al., 2023) without atomics: the same tensors give the same bits. A warp needs no barrier, and
has in its registers what it multiplies next.

The first splits stretches of a head are blocks of T tokens that are all stored as codes (`stretch.py`); the others are
RECENT tokens each of what follows (`recent.py`).
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

from qat.kernels.attention_decode.codes import ACROSS, WORDS
from qat.kernels.attention_decode.recent import attend_recent
from qat.kernels.attention_decode.stretch import attend_blocks, queries_of

# What changes from token to token, and must not make another kernel.
CHANGING = (
    *("splits", "stretches", "length", "key_quantized", "value_quantized", "blocks", "each"),
    *("key_capacity", "value_capacity", "key_scales", "value_scales", "key_recent", "value_recent"),
    *("q_batch", "q_head", "q_token", "mask_batch", "mask_query", "mask_token", "scaling", "lowest"),
)


@triton.jit(do_not_specialize=CHANGING)
def attend(
    q,
    key_codes,
    key_scale,
    key_zero,
    key_tail,
    value_codes,
    value_scale,
    value_zero,
    value_tail,
    mask,
    sums,
    highest,
    mass_of,
    splits,
    stretches,
    length,
    key_quantized,
    value_quantized,
    blocks,
    each,
    key_capacity,
    value_capacity,
    key_scales,
    value_scales,
    key_recent,
    value_recent,
    q_batch,
    q_head,
    q_token,
    mask_batch,
    mask_query,
    mask_token,
    scaling,
    lowest,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    T: tl.constexpr,
    RECENT: tl.constexpr,
    MASK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One stretch of one key head.

    Args:
        q: `[batch, KV_HEADS * GROUP, QUERIES, DIM]` with the strides q_*, the last 1.
        key_codes, value_codes: words `[batch, KV_HEADS, *_capacity, WORDS]`, of which *_quantized tokens are there.
        key_scale, ...: `[batch, KV_HEADS, *_scales, ACROSS]`.
        key_tail, value_tail: `[batch, KV_HEADS, *_recent, DIM]`: tokens from *_quantized on.
        mask: `[batch, 1, QUERIES, length]` with the strides mask_*; MASK says of what kind: none, causal, bool, add.
            Whoever adds `lowest` or less hides a token.
        sums, highest, mass_of: `[batch, KV_HEADS, stretches, GROUP * QUERIES]`, sums times DIM.
        blocks: of T tokens in the first splits stretches, `each` in one.
        scaling: of scores, in units of log2.
        HEADS: GROUP * QUERIES, filled up for the tensor core.
    """
    program = tl.program_id(0)
    split, head = program % stretches, (program // stretches).to(tl.int64)
    batch, kv_head = head // KV_HEADS, head % KV_HEADS
    row = tl.arange(0, HEADS)
    query, present = row % QUERIES, row < GROUP * QUERIES
    q_at = batch * q_batch + (kv_head * GROUP + row // QUERIES) * q_head + query * q_token
    key_codes += head * key_capacity * KEYS[WORDS]
    value_codes += head * value_capacity * VALUES[WORDS]
    key_scale += head * key_scales * KEYS[ACROSS]
    key_zero += head * key_scales * KEYS[ACROSS]
    value_scale += head * value_scales * VALUES[ACROSS]
    value_zero += head * value_scales * VALUES[ACROSS]
    mask += batch * mask_batch
    out = (head * stretches + split) * (GROUP * QUERIES) + row
    results = sums, highest, mass_of, out
    keys = key_codes, key_scale, key_zero, key_tail + head * key_recent * DIM, key_quantized
    values = value_codes, value_scale, value_zero, value_tail + head * value_recent * DIM, value_quantized
    masking = mask, query, length, lowest, mask_query, mask_token
    if split < splits:
        queries, q_sum = queries_of(q, q_at, present, KEYS, DIM)
        end = tl.minimum(split * each + each, blocks)
        attend_blocks(
            queries,
            q_sum,
            keys,
            values,
            masking,
            results,
            present,
            split * each,
            end,
            scaling,
            DIM,
            T,
            MASK,
            KEYS,
            VALUES,
        )
    else:
        token = blocks * T + (split - splits) * RECENT + tl.arange(0, RECENT)
        attend_recent(
            q, q_at, keys, values, masking, results, present, token, scaling, QUERIES, DIM, WIDTH, MASK, KEYS, VALUES
        )


@triton.jit(do_not_specialize=["stretches"])
def add_parts(
    sums,
    highest,
    mass_of,
    out,
    stretches,
    EACH: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The stretches of one query and head, PARTS at a time: `[DIM]` of out; zeros for a query that sees nothing.

    The order of the sums is that of their numbers, whoever was finished first.

    Args:
        sums, highest, mass_of: of `attend`, EACH rows of a key head.
        out: `[batch, heads, queries, DIM]`.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program // EACH * stretches * EACH + program % EACH
    dim, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    tops = tl.full([PARTS], float("-inf"), tl.float32)
    for begin in range(0, stretches, PARTS):
        stretch = begin + part
        own = tl.load(highest + first + stretch * EACH, mask=stretch < stretches, other=float("-inf"))
        tops = tl.maximum(tops, own)
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.zeros([PARTS, WIDTH], tl.float32)
    masses = tl.zeros([PARTS], tl.float32)
    for begin in range(0, stretches, PARTS):
        stretch = begin + part
        there = stretch < stretches
        at = first + stretch * EACH
        share = tl.exp2(tl.load(highest + at, mask=there, other=float("-inf")) - base)
        masses += share * tl.load(mass_of + at, mask=there, other=0.0)
        inside = there[:, None] & (dim < DIM)[None, :]
        totals += share[:, None] * tl.load(sums + at[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    mass = tl.sum(masses, 0)
    value = tl.where(mass > 0, tl.sum(totals, 0) / mass, 0.0)
    tl.store(out + program * DIM + dim, value.to(out.dtype.element_ty), mask=dim < DIM)
