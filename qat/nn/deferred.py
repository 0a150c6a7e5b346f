"""Keys and values that a cache hands to attention without dequantizing them.

Between the two stands the model's own code, which passes two tensors on. These have the shape of all keys and values,
take no memory, are NaN, and know what is stored: attention finds that, and whatever else would compute with them shows.
"""

import torch
from torch import Tensor

from qat.nn.kv_storage import StoredTokens

# New tokens at a time, up to which attention decodes the codes of the others.
FEW = 8


def deferred(stored: StoredTokens) -> Tensor:
    """A tensor that stands for all tokens of `stored`, `[batch, kv_heads, tokens, head_dim]`."""
    assert stored.tail is not None
    batch, heads, _, width = stored.tail.shape
    nothing = torch.full((1, 1, 1, 1), torch.nan, dtype=stored.tail.dtype, device=stored.tail.device)
    tensor = nothing.expand(batch, heads, stored.length, width)
    tensor.stored = stored  # type: ignore[attr-defined]
    return tensor


def stored_behind(key: Tensor, value: Tensor) -> tuple[StoredTokens, StoredTokens] | None:
    """What `key` and `value` stand for, if they are deferred."""
    keys, values = getattr(key, "stored", None), getattr(value, "stored", None)
    return None if keys is None or values is None else (keys, values)
