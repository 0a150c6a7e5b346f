"""The operator of attention to a quantized KV cache, `qat::attention_decode`."""

from typing import Any

import torch
from torch import Tensor

from qat.kernels import dispatch
from qat.kernels.attention_decode import reference
from qat.kernels.attention_decode.cached import CachedTokens
from qat.kernels.dispatch import operator

# Rows of q that share a key head and that kernels take: they stay in registers.
MOST_ROWS = 32


def attention_decode(
    q: Tensor, keys: CachedTokens, values: CachedTokens, mask: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """out = softmax(scaling q K_hat^T + mask) V_hat for one query or a few, straight from the codes of a cache.

    float32 softmax and sums, the same bits in every run. On a GPU kernels read each code once, for q in bfloat16 and
    float16 (flash-decoding, Dao et al., 2023); elsewhere a block of tokens is dequantized after the other. No gradient.

    Args:
        q: `[batch, heads, queries, head_dim]`, of the last tokens.
        keys, values: of as many tokens, and of heads that divide those of q.
        mask: `[batch or 1, 1, queries, tokens]`; boolean, true where a query sees a token, or added to scores, the
            lowest number of its type for what is hidden. None: a query sees every token up to its own.
        scaling: of scores; None is 1 / sqrt(head_dim).

    Returns:
        Like q. Zeros for a query that sees nothing.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _attention_decode_of(q, mask, scaling, *keys, *values)
    return out


def _attention_decode(q: Tensor, mask: Tensor | None, scaling: float, *stored: Any) -> Tensor:
    keys, values = CachedTokens(*stored[:6]), CachedTokens(*stored[6:])
    if _runs_triton(q, keys):
        # Triton is imported at its first use: `import qat` stays light.
        from qat.kernels.attention_decode import triton

        return triton.attention_decode(q, mask, scaling, keys, values)
    return reference.attention_decode(q, mask, scaling, keys, values)


def _runs_triton(q: Tensor, keys: CachedTokens) -> bool:
    rows = q.shape[1] // keys.tail.shape[1] * q.shape[2]
    return dispatch.has_hopper_kernels(q) and q.dtype in (torch.bfloat16, torch.float16) and rows <= MOST_ROWS


def _stored(name: str) -> str:
    return (
        f"Tensor {name}_codes, Tensor {name}_scale, Tensor? {name}_zero_point, Tensor {name}_tail, "
        f"str {name}_format, str {name}_granularity"
    )


_attention_decode_of = operator(
    f"attention_decode(Tensor q, Tensor? mask, float scaling, {_stored('key')}, {_stored('value')}) -> Tensor",
    _attention_decode,
    lambda q, *_: q.new_empty(q.shape),
)
