"""Attention over quantized keys and values, as an attention implementation of transformers.

The contract with the cache: of L keys that reach attention with T queries, those before quantized_until(L - T) come
quantized and dequantized from the cache, and attention quantizes the others itself. Without a cache L = T, nothing is
quantized before, and training runs the same lines as generation.

Where generation adds a token, or a few that see all others alike, the cache hands over no values but what it stores
(`deferred.py`), and attention reads the codes (`qat.kernels.attention_decode`).
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.kernels.attention_decode.ops import attention_decode
from qat.nn.deferred import stored_behind
from qat.nn.kv_quantizer import KVQuantizer, Schedule
from qat.nn.kv_storage import StoredTokens

PREFIX = "quantized_"
# Flash attention of transformers asks the config for its own name, so it cannot run under another one. On a GPU sdpa
# reaches the same kernels.
SUPPORTED = ("sdpa", "eager")
# What some models hand to attention and the selection below does not compute.
_UNKNOWN = ("softcap", "s_aux", "position_bias")

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def register() -> None:
    """Make `quantized_sdpa` and `quantized_eager` known to transformers, each with the masks of what it wraps."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wrapped = {"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"], "eager": _eager_of_the_model}
    for name in SUPPORTED:
        AttentionInterface.register(PREFIX + name, partial(quantized_attention, wrapped[name]))
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def quantized_attention(
    wrapped: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention that sees keys and values as a quantized cache would have stored them.

    Args:
        wrapped: the attention function to call wherever all queries see the same keys and values.
        module: the attention layer; one without a `kv_quantizer` is not quantized.
        query: `[batch, heads, T, head_dim]`.
        key, value: `[batch, kv_heads, L, head_dim]`.
        attention_mask: additive or boolean, `[batch or 1, heads or 1, T, L]`, or None.
        options: scaling, dropout and whatever else transformers passes.

    Returns:
        The output `[batch, T, heads, head_dim]`, and the weights where they were computed.

    Raises:
        InputError: if queries see tokens differently and the model wants a score function that is not supported.
    """
    kv: KVQuantizer | None = getattr(module, "kv_quantizer", None)
    if kv is None:
        return wrapped(module, query, key, value, attention_mask, **options)
    stored = stored_behind(key, value)
    if stored is not None:
        return _decoding_attention(wrapped, module, query, *stored, attention_mask, **options)
    queries, length = query.shape[-2], key.shape[-2]
    key_hat, value_hat = kv.keys(key, length - queries), kv.values(value, length - queries)
    if queries == 1 or kv.is_immediate:
        return wrapped(module, query, key_hat, value_hat, attention_mask, **options)
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise InputError(
            f"{type(module).__name__} uses {unknown[0]}, which attention over groups of tokens or a full-precision "
            "window does not compute: quantize keys and values per_token or per_group_N, with window 0."
        )
    return _selecting_attention(module, query, (key, key_hat), (value, value_hat), attention_mask, **options)


def _decoding_attention(
    wrapped: Attention,
    module: nn.Module,
    query: Tensor,
    stored_keys: StoredTokens,
    stored_values: StoredTokens,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention to what a cache stores, from its codes if that is all that is asked for, else by `wrapped`."""
    keys, values = stored_keys.cached(), stored_values.cached()
    if keys is None or values is None or not _decodes(wrapped, module, query, mask, options):
        return wrapped(module, query, stored_keys.seen(), stored_values.seen(), mask, **options)
    mask = None if mask is None else mask[..., : keys.length]
    out = attention_decode(query, keys, values, mask, options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None


def _decodes(wrapped: Attention, module: nn.Module, query: Tensor, mask: Tensor | None, options: Any) -> bool:
    """Whether `attention_decode` computes what `wrapped` would: sdpa with one mask for all heads, and nothing else.

    Eager attention returns its weights, and may be asked for them; gradients of q need the values.
    """
    if wrapped is _eager_of_the_model or options.get("dropout") or query.requires_grad:
        return False
    if any(options.get(name) is not None for name in (*_UNKNOWN, "sliding_window", "cache")):
        return False
    if mask is not None:
        return mask.dim() == 4 and mask.shape[1] == 1
    causal = options.get("is_causal")
    return query.shape[2] == 1 or bool(getattr(module, "is_causal", True) if causal is None else causal)


def _selecting_attention(
    module: nn.Module,
    query: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in which each query selects, token by token, the quantized or the full-precision form.

        P = softmax(where(seen quantized, q K_hat^T, q K^T) * scaling + mask)
        out = (P where seen quantized) V_hat + (P elsewhere) V

    Exact for every query at once; takes memory O(T * L), as eager attention does.

    Args:
        keys, values: in full precision and fake-quantized.
    """
    heads, (queries, length) = query.shape[1], (query.shape[-2], keys[0].shape[-2])
    (key, key_hat), (value, value_hat) = ([_repeated(form, heads) for form in forms] for forms in (keys, values))
    kv: Any = module.kv_quantizer
    ends = torch.arange(length - queries + 1, length + 1, device=query.device)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.where(_seen_quantized(kv.key_schedule, ends, length), query @ key_hat.mT, query @ key.mT)
    if mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        mask = torch.arange(length, device=query.device) < ends[:, None]
    scores, blind = (scores, None) if mask is None else _masked(scores, mask[..., :length])
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    quantized = _seen_quantized(kv.value_schedule, ends, length)
    out = weights.masked_fill(~quantized, 0) @ value_hat + weights.masked_fill(quantized, 0) @ value
    out = out if blind is None else out.masked_fill(blind, 0)
    return out.transpose(1, 2).contiguous(), weights


def _seen_quantized(schedule: Schedule, ends: Tensor, length: int) -> Tensor:
    """Whether each query sees each token in quantized form, `[T, L]`; `ends` are the queries' slots plus one."""
    return torch.arange(length, device=ends.device) < schedule.quantized_until(ends)[:, None]


def _masked(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`scores` under a boolean or an additive mask; and which queries see nothing, `[..., T, 1]`.

    Such a query is padding. If it attended to everything, as eager attention lets it, its key in the next layer would
    know later tokens, and tell them to the tokens it shares a scale with.
    """
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, lowest), ~mask.any(-1, keepdim=True)
    hidden = mask <= torch.finfo(mask.dtype).min
    return (scores + mask).clamp(min=lowest), hidden.all(-1, keepdim=True)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Each head of keys or values as often as it has query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _eager_of_the_model(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the file that defines `module`; transformers keeps one in each."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if eager is not None:
            attended: tuple[Tensor, Tensor | None] = eager(module, *args, **options)
            return attended
    raise InputError(f"{type(module).__name__} has no eager attention to wrap: set model.attention=sdpa.")
