"""Attention to the last tokens: those in full precision, and what does not fill a block of codes.

There are few, so they are read value by value, and every one may be hidden from a query.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, N806
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

from qat.kernels.attention_decode.codes import BITS, CENTER, HAS_ZERO, WORDS, of_values
from qat.kernels.attention_decode.softmax import masked


@triton.jit
def _values(stored, token, dim, length, like, GRID: tl.constexpr, DIM: tl.constexpr):
    """Keys or values of tokens `[T, 1]` times dimensions `[1, WIDTH]`, or the other way round; 0 beyond `length`."""
    codes, scale, zero, tail, quantized = stored
    PER: tl.constexpr = 32 // GRID[BITS]
    coded = (token < quantized) & (dim < DIM)
    words = tl.load(codes + token * GRID[WORDS] + dim // PER, mask=coded, other=0)
    value = (((words >> (dim % PER * GRID[BITS])) & (2 ** GRID[BITS] - 1)) - GRID[CENTER]).to(tl.float32)
    known = tl.where(coded, token, -1)  # scales of others do not exist
    if GRID[HAS_ZERO]:
        value -= of_values(zero, known, dim, GRID, DIM)
    value *= of_values(scale, known, dim, GRID, DIM)
    full = tl.load(
        tail + (token - quantized) * DIM + dim,
        mask=(token >= quantized) & (token < length) & (dim < DIM),
        other=0,
    )
    return tl.where(token < quantized, value.to(like), full.to(like))


@triton.jit
def attend_recent(
    q,
    q_at,
    keys,
    values,
    masking,
    results,
    present,
    token,
    scaling,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The tokens `token` `[T]`; the arguments are those of `attend`, by what they are for."""
    mask, query, length, lowest, query_stride, token_stride = masking
    sums, highest, mass_of, out = results
    like: tl.constexpr = q.dtype.element_ty
    dim = tl.arange(0, WIDTH)
    inside = present[None, :] & (dim < DIM)[:, None]
    own = tl.load(q + q_at[None, :] + dim[:, None], mask=inside, other=0.0)
    scores = scaling * tl.dot(_values(keys, token[:, None], dim[None, :], length, like, KEYS, DIM), own)
    scores = masked(scores, mask, token, query, length, lowest, query_stride, token_stride, MASK)
    if MASK == "causal":
        scores = tl.where(token[:, None] <= length - QUERIES + query[None, :], scores, float("-inf"))
    top = tl.max(scores, 0)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[None, :])
    found = _values(values, token[None, :], dim[:, None], length, like, VALUES, DIM)
    tl.store(sums + out[None, :] * DIM + dim[:, None], tl.dot(found, weights.to(like)), mask=inside)
    tl.store(highest + out, top, mask=present)
    tl.store(mass_of + out, tl.sum(weights, 0), mask=present)
