"""Hidden states of the student against those of its teacher."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.distillation.watched import paired_blocks
from qat.errors import InputError


def normalised_error(own: Tensor, theirs: Tensor, counts: Tensor) -> Tensor:
    """mean_i ||h_i - t_i||^2 / ||t_i||^2 over the tokens i that count: 0 is the same, 1 as far as 0 is.

    Every token weighs the same, though the norms of a few are a thousand times those of others ("Massive Activations in
    Large Language Models", arXiv 2402.17762).

    Args:
        own, theirs: `[batch, tokens, features]`.
        counts: `[batch, tokens]`, whether a token counts.
    """
    theirs = theirs.float()
    tiny = torch.finfo(torch.float32).tiny
    errors = (own.float() - theirs).square().mean(-1) / theirs.square().mean(-1).clamp(min=tiny)
    return torch.where(counts, errors, 0).sum() / counts.sum().clamp(min=1)


class HiddenStates:
    """The mean of `normalised_error` over the outputs of blocks.

    "Patient Knowledge Distillation for BERT Model Compression" (arXiv 1908.09355) divides both states by their own
    norms; here only the teacher's divides, so that the student learns lengths too.

    Args:
        weight: what it is multiplied by; 0: off.
        layers: indices of blocks, negative ones from the end; None: all.

    Raises:
        InputError: if the weight is negative.
    """

    def __init__(self, weight: float = 0.0, layers: Sequence[int] | None = None) -> None:
        if not isinstance(weight, int | float) or weight < 0:
            raise InputError(f"distill.hidden.weight is {weight}; it starts at 0, which is off: set it to 1.")
        self.weight, self.layers = weight, layers

    def pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """What to watch in both.

        Raises:
            InputError: if there is no such block, or the hidden states have other sizes.
        """
        own, theirs = (model.config.hidden_size for model in (student, teacher))
        if own != theirs:
            raise InputError(
                f"distill.hidden compares hidden states, which have {own} features in the student and {theirs} in the "
                "teacher: set distill.hidden.weight=0, and distill.attention.weight=1, which takes any sizes."
            )
        return paired_blocks("distill.hidden.layers", self.layers, student, teacher)

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], batch: Mapping[str, Tensor]) -> Tensor:
        counts = counting(batch)
        return torch.stack([normalised_error(own, theirs, counts) for own, theirs in pairs]).mean()


def counting(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of `batch` are no padding, `[batch, tokens]`; prompts count too, because answers attend to them."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
