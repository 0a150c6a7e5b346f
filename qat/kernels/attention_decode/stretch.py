"""Attention to blocks of tokens that are all stored as codes.

    scores^T = K_hat q^T,    out^T += V_hat^T weights^T

Codes are the left operand of the tensor core, decoded in the registers from which it takes them; its 8 columns are
query heads, so that few of them are padding.

    keys     the sum runs over dimensions, in any order: pair i of all words is a product of its own with those parts
             of q, and its halves are neighbours in the sum.
    values   the sum runs over tokens: the halves of the words of two tokens are exchanged first, so that neighbours
             in the sum are the same dimension of both, and code j of all words is every PER-th row of the result.

So nothing that was decoded moves between lanes. Scales and zero points stay away from values where they can:

    shared by a token            they multiply its scores and its weights
    of keys, shared by a block   they multiply q, which is small: KIVI's scales for each channel
    else                         they multiply values in float32

A zero point z takes z sum(q) off scores, and z sum(weights) off results.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, N806, RUF005
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

from qat.kernels.attention_decode.codes import (
    ACROSS,
    BITS,
    COLUMNS,
    HAS_ZERO,
    ROWS,
    WIDE,
    WORDS,
    of_tokens,
    of_values,
    pairs_of,
    scaled,
    words_of,
)
from qat.kernels.attention_decode.softmax import masked, softmax_step


@triton.jit
def _dims_of_pair(i: tl.constexpr, GRID: tl.constexpr):
    """Dimensions of pair i of all words: `[2 WIDE]`."""
    k = tl.arange(0, 2 * GRID[WIDE])
    return k // 2 * (32 // GRID[BITS]) + k % 2 * (16 // GRID[BITS]) + i


@triton.jit
def queries_of(q, at, present, GRID: tl.constexpr, DIM: tl.constexpr):
    """Parts of q^T for each pair, `[2 WIDE, HEADS]`, and the sums over dimensions; a head begins `at`."""
    found = ()
    COUNT: tl.constexpr = 16 // GRID[BITS]
    total = tl.zeros(at.shape, tl.float32)
    for i in tl.static_range(COUNT):
        dim = _dims_of_pair(i, GRID)
        own = tl.load(q + at[None, :] + dim[:, None], mask=present[None, :] & (dim < DIM)[:, None], other=0.0)
        found = found + (own,)
        total += tl.sum(own.to(tl.float32), 0)
    return found, total


@triton.jit
def _scores(queries, q_sum, stored, block, KEYS: tl.constexpr, DIM: tl.constexpr, T: tl.constexpr):
    """K_hat q^T of a block of tokens, `[T, HEADS]` float32."""
    COUNT: tl.constexpr = 16 // KEYS[BITS]
    SUM: tl.constexpr = 2 * KEYS[WIDE]
    HEADS: tl.constexpr = queries[0].shape[1]
    codes, scale, zero, _, _ = stored
    token = block * T + tl.arange(0, T)
    pairs = pairs_of(words_of(codes, token, KEYS), queries[0].dtype, KEYS)
    scores = tl.zeros([T, HEADS], tl.float32)
    off = tl.zeros([HEADS], tl.float32)
    for i in tl.static_range(COUNT):
        keys, query = tl.reshape(pairs[i], [T, SUM]), queries[i]
        dim = _dims_of_pair(i, KEYS)
        if (KEYS[COLUMNS] != DIM) and (KEYS[ROWS] % T == 0):
            query, zeros = _scaled_queries(query, scale, zero, block * T, dim, KEYS, DIM)
            off += zeros
        elif KEYS[COLUMNS] != DIM:
            keys = scaled(keys, scale, zero, token[:, None], dim[None, :], KEYS, DIM)
        scores = tl.dot(keys, query, scores)
    if KEYS[COLUMNS] == DIM:
        if KEYS[HAS_ZERO]:
            scores -= of_tokens(zero, block, KEYS, T)[:, None] * q_sum[None, :]
        scores *= of_tokens(scale, block, KEYS, T)[:, None]
    elif (KEYS[ROWS] % T == 0) and KEYS[HAS_ZERO]:
        scores -= off[None, :]
    return scores


@triton.jit
def _scaled_queries(query, scale, zero, token, dim, KEYS: tl.constexpr, DIM: tl.constexpr):
    """q times the scales of a block that begins with `token`, and what its zero points take off the scores."""
    found = (query.to(tl.float32) * of_values(scale, token, dim, KEYS, DIM)[:, None]).to(query.dtype)
    off = tl.zeros([query.shape[1]], tl.float32)
    if KEYS[HAS_ZERO]:
        off = tl.sum(found.to(tl.float32) * of_values(zero, token, dim, KEYS, DIM)[:, None], 0)
    return found, off


@triton.jit
def _exchanged(words, T: tl.constexpr, WIDTH: tl.constexpr):
    """For each two tokens their low halves in one word, and their high halves: `[T / 2, WIDTH]` each."""
    first, second = tl.split(tl.permute(tl.reshape(words, [T // 2, 2, WIDTH]), (0, 2, 1)))
    return (first & 0xFFFF) | (second << 16), ((first >> 16) & 0xFFFF) | (second & -65536)


@triton.jit
def _dims_of_total(j: tl.constexpr, GRID: tl.constexpr):
    """Dimensions of total j. The tensor core has 16 rows, so of 8 words it takes two codes at a time."""
    PARTS: tl.constexpr = 2 if GRID[WIDE] == 8 else 1
    PER: tl.constexpr = 32 // GRID[BITS]
    row = tl.arange(0, PARTS * GRID[WIDE])
    return row % GRID[WIDE] * PER + row // GRID[WIDE] * (PER // 2) + j


@triton.jit
def _scaled_pairs(pairs, scale, zero, block, VALUES: tl.constexpr, T: tl.constexpr):
    """Pairs `[T / 2, WIDE, 2]` of two tokens, scaled where all codes of a word have the same scale.

    Differences of integers are exact, so there is one rounding, as in float32.
    """
    like: tl.constexpr = pairs[0].dtype
    token = block * T + 2 * tl.arange(0, T // 2)[:, None, None] + tl.arange(0, 2)[None, None, :]
    word = tl.arange(0, VALUES[WIDE])[None, :, None]
    at = token // VALUES[ROWS] * VALUES[ACROSS] + word // (VALUES[COLUMNS] * VALUES[BITS] // 32)
    there = (word < VALUES[WORDS]) & (token >= 0)
    s = tl.load(scale + at, mask=there, other=0)
    z = tl.zeros(at.shape, like)
    if VALUES[HAS_ZERO]:
        z = tl.load(zero + at, mask=there, other=0).to(tl.float32).to(like)
    found = ()
    for j in tl.static_range(len(pairs)):
        if like == tl.float16:  # which does not hold the smallest scales
            found = found + (((pairs[j] - z).to(tl.float32) * s.to(tl.float32)).to(like),)
        else:
            found = found + ((pairs[j] - z) * s.to(like),)
    return found


@triton.jit
def _add_values(totals, off, weights, stored, block, like, VALUES: tl.constexpr, DIM: tl.constexpr, T: tl.constexpr):
    """`totals` `[dims, HEADS]` with V_hat^T weights of a block of tokens added, and what zero points take off."""
    codes, scale, zero, _, _ = stored
    if VALUES[COLUMNS] == DIM:
        weights = weights * of_tokens(scale, block, VALUES, T)[:, None]
    rounded = weights.to(like)
    if (VALUES[COLUMNS] == DIM) and VALUES[HAS_ZERO]:
        # A product like the others, every row the same: the compiler reads ahead what products need, and nothing else.
        zeros = tl.broadcast_to(of_tokens(zero, block, VALUES, T).to(like)[None, :], [totals[0].shape[0], T])
        off = tl.dot(zeros, rounded, off)
    token = block * T + tl.arange(0, T)
    WIDTH: tl.constexpr = VALUES[WIDE]
    COUNT: tl.constexpr = 16 // VALUES[BITS]
    low, high = _exchanged(words_of(codes, token, VALUES), T, WIDTH)
    pairs = pairs_of(low, like, VALUES) + pairs_of(high, like, VALUES)
    PER: tl.constexpr = 2 * COUNT
    if (VALUES[COLUMNS] != DIM) and (VALUES[COLUMNS] % PER == 0):
        pairs = _scaled_pairs(pairs, scale, zero, block, VALUES, T)
    found = ()
    for j in tl.static_range(len(totals)):
        if WIDTH == 8:
            values = tl.reshape(tl.permute(tl.join(pairs[j], pairs[j + COUNT]), (3, 1, 0, 2)), [16, T])
        else:
            values = tl.reshape(tl.permute(pairs[j], (1, 0, 2)), [WIDTH, T])
        if (VALUES[COLUMNS] != DIM) and (VALUES[COLUMNS] % PER != 0):
            values = scaled(values, scale, zero, token[None, :], _dims_of_total(j, VALUES)[:, None], VALUES, DIM)
        found = found + (tl.dot(values, rounded, totals[j]),)
    return found, off


@triton.jit
def attend_blocks(
    queries,
    q_sum,
    keys,
    values,
    masking,
    results,
    present,
    first,
    end,
    scaling,
    DIM: tl.constexpr,
    T: tl.constexpr,
    MASK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Blocks from `first` to `end`; the arguments are those of `attend`, by what they are for."""
    mask, query, length, lowest, query_stride, token_stride = masking
    sums, highest, mass_of, out = results
    HEADS: tl.constexpr = q_sum.shape[0]
    TALL: tl.constexpr = VALUES[WIDE] if VALUES[WIDE] > 16 else 16
    COUNT: tl.constexpr = 32 // VALUES[BITS] * VALUES[WIDE] // TALL
    top = tl.full([HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    off = tl.zeros([TALL, HEADS], tl.float32)
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([TALL, HEADS], tl.float32),)
    for block in range(first, end):
        scores = scaling * _scores(queries, q_sum, keys, block, KEYS, DIM, T)
        if (MASK == "add") or (MASK == "bool"):
            token = block * T + tl.arange(0, T)
            scores = masked(scores, mask, token, query, length, lowest, query_stride, token_stride, MASK)
        top, mass, off, totals, weights = softmax_step(scores, top, mass, off, totals)
        totals, off = _add_values(totals, off, weights, values, block, queries[0].dtype, VALUES, DIM, T)
    for j in tl.static_range(COUNT):
        dim = _dims_of_total(j, VALUES)
        inside = present[None, :] & (dim < DIM)[:, None]
        tl.store(sums + out[None, :] * DIM + dim[:, None], totals[j] - off, mask=inside)
    tl.store(highest + out, top, mask=present)
    tl.store(mass_of + out, mass, mask=present)
