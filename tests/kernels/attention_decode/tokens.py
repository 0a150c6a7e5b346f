"""Cached tokens of every layout, and attention to them as it is defined."""

from functools import partial

import torch
from torch.nn import functional as F

from qat.kernels.attention_decode.cached import CachedTokens
from qat.nn.kv_quantizer import Schedule, tokens_of_group
from qat.nn.kv_storage import StoredTokens
from qat.quantizers import MinMaxQuantizer

TOKEN = partial(MinMaxQuantizer, granularity="per_token", symmetric=False)
GROUP = partial(MinMaxQuantizer, granularity="per_group_16", symmetric=False)
STATIC = partial(MinMaxQuantizer, dynamic=False)


def block(tokens, columns=1):
    return partial(MinMaxQuantizer, granularity=f"per_block_{tokens}x{columns}", symmetric=False)


# Keys, values, window.
LAYOUTS = {
    "8": (partial(TOKEN, bits=8), partial(TOKEN, bits=8), 0),
    "8, symmetric": (partial(TOKEN, bits=8, symmetric=True), partial(TOKEN, bits=8, symmetric=True), 3),
    "4": (partial(TOKEN, bits=4), partial(TOKEN, bits=4), 0),
    "4, symmetric": (partial(TOKEN, bits=4, symmetric=True), partial(TOKEN, bits=4, symmetric=True), 7),
    "2": (partial(TOKEN, bits=2), partial(TOKEN, bits=2), 5),
    "4, float32 scales": (partial(TOKEN, bits=4, scale_dtype="float32"), partial(GROUP, bits=4), 0),
    "groups": (partial(GROUP, bits=4), partial(GROUP, bits=2), 0),
    "kivi": (partial(block(32), bits=2), partial(GROUP, bits=2), 32),
    "kivi of 4 bits": (partial(block(32), bits=4), partial(TOKEN, bits=4), 32),
    "small blocks": (partial(block(4), bits=4), partial(block(8), bits=4), 3),
    "blocks of whole tokens": (partial(block(4, 64), bits=4), partial(block(16, 64), bits=8), 0),
    "blocks of 48": (partial(block(48), bits=4), partial(block(48), bits=4), 0),
    "static": (
        partial(STATIC, bits=4, granularity="per_channel_-1"),
        partial(STATIC, bits=8, granularity="per_tensor"),
        9,
    ),
}


def cached(factory, x, window=0):
    """Tokens `x` `[batch, heads, tokens, head_dim]` as a cache stores them."""
    quantizer = factory(shape=(0, x.shape[-1])).to(x.device)
    if not quantizer.initialized:
        quantizer.initialize(x)
    stored = StoredTokens(quantizer, Schedule(tokens_of_group(quantizer), window))
    stored.add(x)
    return stored.cached()


def case(layout, length=150, heads=(4, 2), head_dim=64, queries=1, batch=2, dtype=torch.float16, device="cpu"):
    """q, keys and values of a layout; values and keys have an outlying channel, as models' do."""
    key, value, window = LAYOUTS[layout]
    q = torch.randn(batch, heads[0], queries, head_dim, device=device).to(dtype)
    k, v = (torch.randn(batch, heads[1], length, head_dim, device=device) for _ in range(2))
    k[..., 3] += 4
    return q, cached(key, k.to(dtype), window), cached(value, v.to(dtype), window)


def padded(batch, queries, length, padding=(0, 37), device="cpu"):
    """A boolean mask of texts with padding on their left."""
    slots = torch.arange(length, device=device)
    seen = slots >= torch.tensor(padding, device=device)[:batch, None, None, None]
    return seen & (slots <= torch.arange(length - queries, length, device=device)[:, None])


def defined(q, keys: CachedTokens, values: CachedTokens, mask=None, scaling=None):
    """The definition, from all tokens dequantized, in float64."""
    k, v = (own.values(0, own.length, q.dtype).double() for own in (keys, values))
    if mask is None:
        mask = padded(len(q), q.shape[2], keys.length, [0] * len(q), q.device)
    mask = mask if mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(q.double(), k, v, mask, scale=scaling, enable_gqa=True)
