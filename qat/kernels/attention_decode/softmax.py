"""Masks, and a softmax over scores that come block by block."""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, RUF005
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def masked(scores, mask, token, query, length, lowest, query_stride, token_stride, MASK: tl.constexpr):
    """Scores `[T, HEADS]` in units of log2, minus infinity where a query does not see a token."""
    seen = (token < length)[:, None]
    if MASK == "add" or MASK == "bool":
        at = mask + query[None, :] * query_stride + token[:, None] * token_stride
        own = tl.load(at, mask=seen, other=0)
        if MASK == "bool":
            seen = seen & (own != 0)
        else:
            own = own.to(tl.float32)
            seen = seen & (own > lowest)
            scores += own * _LOG2_E
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def softmax_step(scores, top, mass, off, totals):
    """The next step of a softmax that sees scores block by block: maximum, sums and results so far, and weights."""
    higher = tl.maximum(top, tl.max(scores, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[None, :])
    shrink = tl.exp2(top - base)
    found = ()
    for j in tl.static_range(len(totals)):
        found = found + (totals[j] * shrink[None, :],)
    return higher, mass * shrink + tl.sum(weights, 0), off * shrink[None, :], found, weights
