"""Attention to cached codes, a block of tokens after the other: what is dequantized stays small."""

import math

import torch
from torch import Tensor

from qat.kernels.attention_decode.cached import EVERY_TOKEN, CachedTokens, shared_by

# Tokens of a block, about.
_BLOCK = 1024


def attention_decode(
    q: Tensor, mask: Tensor | None, scaling: float, keys: CachedTokens, values: CachedTokens
) -> Tensor:
    """See `ops.attention_decode`. Scores, softmax and sums are float32, or the type of q if that is longer."""
    batch, _, queries, width = q.shape
    kv_heads, length = keys.tail.shape[1], keys.length
    exact = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(batch, kv_heads, -1, width).to(exact) * scaling
    top = torch.full((*rows.shape[:-1], 1), -math.inf, dtype=exact, device=q.device)
    mass, total = torch.zeros_like(top), torch.zeros_like(rows)
    step = _step(keys, values)
    for begin in range(0, length, step):
        end = min(begin + step, length)
        key, value = (stored.values(begin, end, q.dtype).to(exact) for stored in (keys, values))
        scores = _hidden(rows @ key.mT, mask, queries, begin, end, length)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -math.inf, 0)
        weights, shrink = torch.exp(scores - base), torch.exp(top - base)
        mass = mass * shrink + weights.sum(-1, keepdim=True)
        total = total * shrink + weights @ value
        top = higher
    out = torch.where(mass > 0, total / mass, 0)
    return out.to(q.dtype).view(q.shape)


def _step(*stored: CachedTokens) -> int:
    """Tokens of a block: a multiple of the groups of keys and of values."""
    groups = (shared_by(own.granularity, own.tail.shape[-1])[0] for own in stored)
    least = math.lcm(*(1 if group == EVERY_TOKEN else group for group in groups))
    return least * max(1, _BLOCK // least)


def _hidden(scores: Tensor, mask: Tensor | None, queries: int, begin: int, end: int, length: int) -> Tensor:
    """Scores `[batch, kv_heads, group * queries, tokens]`, minus infinity where a query does not see a token."""
    split = scores.unflatten(2, (-1, queries))
    if mask is None:
        slots = torch.arange(begin, end, device=scores.device)
        seen = slots <= torch.arange(length - queries, length, device=scores.device)[:, None]
        return split.masked_fill(~seen, -math.inf).flatten(2, 3)
    own = mask[:, :, None, :, begin:end]
    if mask.dtype == torch.bool:
        return split.masked_fill(~own, -math.inf).flatten(2, 3)
    hidden = own <= torch.finfo(mask.dtype).min
    return (split + own).masked_fill(hidden, -math.inf).flatten(2, 3)
