"""How tokens relate to each other inside attention, in the student and in its teacher."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.distillation.hidden import counting
from lightning_modules.distillation.watched import paired_blocks
from qat.errors import InputError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_NEVER = -1e9  # finite: its probability is 0 and its logarithm makes no NaN


def log_relations(x: Tensor, heads: int, counts: Tensor) -> Tensor:
    """log softmax_j (x_i . x_j / sqrt(d)) for each of `heads` parts of d features: how token i relates to itself and to
    those before it.

    Later tokens and padding are left out, as a causal model leaves them out of its attention.

    Args:
        x: `[batch, tokens, heads * d]`.
        counts: `[batch, tokens]`, false for padding.

    Returns:
        `[batch, heads, tokens, tokens]`, float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        parts = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = parts @ parts.mT / math.sqrt(parts.shape[-1])
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril() & counts[:, None, None]
    return scores.masked_fill(~seen, _NEVER).log_softmax(-1)


def relation_kl(own: Tensor, theirs: Tensor, heads: int, counts: Tensor) -> Tensor:
    """The mean over heads and tokens of KL(R_teacher || R_student), R as in `log_relations`, in nats.

    The features of student and teacher may differ in number; `heads` divides both.
    """
    log_p, log_q = log_relations(theirs, heads, counts), log_relations(own, heads, counts)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.where(counts[:, None], rows, 0).sum() / (counts.sum().clamp(min=1) * heads)


class AttentionRelations:
    """The mean of `relation_kl` of queries, of keys and of values with themselves.

    "MiniLM" (arXiv 2002.10957) and "MiniLMv2: Multi-Head Self-Attention Relation Distillation" (arXiv 2012.15828).

    Args:
        weight: what it is multiplied by; 0: off.
        layers: indices of blocks, negative ones from the end.
        heads: relation heads, into which queries, keys and values are divided; None: as many as the student has key
            and value heads.

    Raises:
        InputError: if the weight is negative or `heads` is no whole number.
    """

    def __init__(self, weight: float = 0.0, layers: Sequence[int] = (-1,), heads: int | None = None) -> None:
        if not isinstance(weight, int | float) or weight < 0:
            raise InputError(f"distill.attention.weight is {weight}; it starts at 0, which is off: set it to 1.")
        if heads is not None and (not isinstance(heads, int) or heads < 1):
            raise InputError(f"distill.attention.heads is {heads}; it is a whole number from 1 on, or null.")
        self.weight, self.layers, self.heads = weight, layers, heads

    def pairs(self, student: Any, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """What to watch in both.

        Raises:
            InputError: if there is no such block, it has no projections of known names, or `heads` does not divide one.
        """
        if self.heads is None:
            config = student.config
            self.heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        blocks = paired_blocks("distill.attention.layers", self.layers, student, teacher)
        found = [pair for own, theirs in blocks for pair in zip(_projections(own), _projections(theirs), strict=True)]
        for layer in (layer for pair in found for layer in pair):
            if layer.out_features % self.heads:
                raise InputError(
                    f"distill.attention.heads is {self.heads}, which does not divide the {layer.out_features} features "
                    "of a projection: set it to a common divisor of all in student and teacher."
                )
        return found  # type: ignore[return-value]

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], batch: Mapping[str, Tensor]) -> Tensor:
        assert self.heads is not None
        counts = counting(batch)
        return torch.stack([relation_kl(own, theirs, self.heads, counts) for own, theirs in pairs]).mean()


def _projections(block: nn.Module) -> list[nn.Linear]:
    """The layers of `block` that make queries, keys and values."""
    named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    found = [named[name] for name in _PROJECTIONS if isinstance(named.get(name), nn.Linear)]
    if len(found) != len(_PROJECTIONS):
        raise InputError(
            f"distill.attention compares the outputs of {', '.join(_PROJECTIONS)}, which {type(block).__name__} has "
            "not: set distill.attention.weight=0."
        )
    return found  # type: ignore[return-value]
