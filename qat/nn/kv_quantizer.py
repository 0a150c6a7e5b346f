"""The quantizers of one attention layer's keys and values, and from when on a token is quantized."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn.activation import StoredActivation
from qat.numerics.granularity import PerBlock
from qat.quantizers import Quantizer

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Schedule:
    """Which tokens a query sees in quantized form. Training and generation both ask here.

    The query in cache slot i sees the token in slot j quantized if j < quantized_until(i + 1), with

        quantized_until(length) = floor(max(0, length - window) / group) * group

    So the last `window` tokens stay in full precision, and with them the group that is not complete yet: the residual
    of KIVI (arXiv 2402.02750). Groups are aligned to cache slots, and left padding takes slots: a group that holds
    padding and text has scales that saw both.

    Args:
        group: tokens that share a scale; 0 where nothing is quantized.
        window: the latest tokens, which stay in full precision.
    """

    group: int
    window: int

    def quantized_until(self, length: Count) -> Count:
        """How many tokens are quantized once there are `length`; integers, or a tensor of them."""
        beyond = (length - self.window) * (length > self.window)
        return beyond // self.group * self.group if self.group else beyond * 0

    @property
    def is_immediate(self) -> bool:
        """Whether all queries see a token alike: quantized from its first use on, or never."""
        return self.group == 0 or (self.group == 1 and self.window == 0)


class KVQuantizer(nn.Module):
    """Quantizes the keys and values of one attention layer, `[batch, heads, tokens, head_dim]`, after RoPE.

    The layout is a granularity: `per_token` gives each token of each head a scale (LLM-QAT, arXiv 2305.17888),
    `per_group_N` several of them along head_dim, and `per_block_32x1` one to every channel of 32 tokens, as KIVI does
    for keys (arXiv 2402.02750). Static quantizers are `per_tensor` or `per_channel_-1`.

    Args:
        key_quantizer: a Quantizer, the StoredActivation that it became, or `nn.Identity` for full precision.
        value_quantizer: the same for values.
        window: the number of latest tokens that stay in full precision.

    Raises:
        InputError: if `window` is no number of tokens.
    """

    def __init__(self, key_quantizer: nn.Module, value_quantizer: nn.Module, window: int = 0) -> None:
        super().__init__()
        if not isinstance(window, int) or window < 0:
            raise InputError(f"The window of a KV cache is a number of tokens, not {window}: set it to 0, 32, 128 ...")
        self.key_quantizer = key_quantizer
        self.value_quantizer = value_quantizer
        self.window = window
        self.key_schedule = Schedule(tokens_of_group(key_quantizer), window)
        self.value_schedule = Schedule(tokens_of_group(value_quantizer), window)

    def keys(self, key: Tensor, seen: int) -> Tensor:
        """`key` as the last query sees it; what the cache had quantized when it held `seen` tokens stays as it is."""
        return _fake_quantize_from(seen, key, self.key_quantizer, self.key_schedule)

    def values(self, value: Tensor, seen: int) -> Tensor:
        """The same for values."""
        return _fake_quantize_from(seen, value, self.value_quantizer, self.value_schedule)

    @property
    def is_immediate(self) -> bool:
        """Whether every query sees the same keys and values, so that any attention kernel will do."""
        return self.key_schedule.is_immediate and self.value_schedule.is_immediate

    @property
    def layout(self) -> tuple[object, ...]:
        """What a cache must agree on: the grid of keys and of values, and from when on tokens are quantized."""
        return self.key_schedule, self.value_schedule, _grid(self.key_quantizer), _grid(self.value_quantizer)

    @property
    def is_observing(self) -> bool:
        """Whether a quantizer is being calibrated, and nothing can be stored yet."""
        roles = (self.key_quantizer, self.value_quantizer)
        return any(isinstance(role, Quantizer) and role.observer is not None for role in roles)

    def extra_repr(self) -> str:
        return f"window={self.window}"


def tokens_of_group(quantizer: nn.Module) -> int:
    """How many tokens share a scale of `quantizer`; 0 if it is none."""
    if not isinstance(quantizer, Quantizer | StoredActivation):
        return 0
    return quantizer.granularity.rows if isinstance(quantizer.granularity, PerBlock) else 1


def _grid(quantizer: nn.Module) -> tuple[object, ...] | None:
    if not isinstance(quantizer, Quantizer | StoredActivation):
        return None
    return quantizer.format, quantizer.granularity, quantizer.rule, quantizer.scale_dtype


def kv_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, KVQuantizer]]:
    """Every attention layer of `model` that has a KVQuantizer: its name, itself and the KVQuantizer."""
    for name, module in model.named_modules():
        kv = getattr(module, "kv_quantizer", None)
        if isinstance(kv, KVQuantizer):
            yield name, module, kv


def _fake_quantize_from(seen: int, x: Tensor, quantizer: nn.Module, schedule: Schedule) -> Tensor:
    """Fake-quantize the complete groups of `x` that were not yet quantized when there were `seen` tokens."""
    length = x.shape[-2]
    begin, end = schedule.quantized_until(seen), schedule.quantized_until(length)
    if begin == end:
        return x
    x_hat: Tensor = quantizer(x[..., begin:end, :])
    return x_hat if (begin, end) == (0, length) else torch.cat([x[..., :begin, :], x_hat, x[..., end:, :]], dim=-2)
