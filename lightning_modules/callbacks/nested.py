"""Training one set of codes for several widths."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.causal_lm import CausalLMModule, Loss
from qat.errors import InputError
from qat.quantizers import NestedQuantizer


class NestedBits(Callback):
    """Trains all widths of nested quantizers: in turns, or by the sum of their losses ("MatQuant", arXiv 2502.06786).

    MatQuant takes in every step

        loss = sum_b weight_b * loss at b bits

    of one batch, which costs a forward and a backward pass for each width, and the memory of all of them. Turns, one
    width for each optimizer step, have the gradient of such a sum on the average, at the cost of one width. Between
    steps, and so for evaluation, quantizers are at the width that ships.

    Args:
        turns: widths of successive steps, over and over; [8, 4, 2, 2] gives half of the steps to two bits. None: every
            width of each quantizer in turn.
        weights: weights of losses by width, in the place of turns: {8: 1.0, 4: 1.0, 2: 1.0}. None: turns.

    Raises:
        InputError: if there are both, or a weight is not positive.
    """

    def __init__(self, turns: Sequence[int] | None = None, weights: Mapping[int, float] | None = None) -> None:
        if turns is not None and weights is not None:
            raise InputError(
                "callbacks.nested.turns and callbacks.nested.weights are two ways to train: set one of them to null."
            )
        for bits, weight in (weights or {}).items():
            if not isinstance(weight, int | float) or not weight > 0:
                raise InputError(f"callbacks.nested.weights has {weight} for {bits} bits; it is positive: set it to 1.")
        self.turns, self.weights = turns, weights
        self._nested: list[NestedQuantizer] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._nested = [module for module in pl_module.modules() if isinstance(module, NestedQuantizer)]
        for name, widths in (("turns", self.turns), ("weights", self.weights)):
            if widths is not None:
                self._check(name, list(widths))
        if self.weights is not None:
            assert isinstance(pl_module, CausalLMModule)
            _check_passes(pl_module)
            pl_module.passes = self._summed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.weights is not None:
            return
        for quantizer in self._nested:
            turns = self.turns or quantizer.widths
            quantizer.at(turns[trainer.global_step % len(turns)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for quantizer in self._nested:
            quantizer.at(quantizer.widths[0])

    def _summed(self, loss: Loss) -> Tensor:
        """The weighted sum; the width that ships is the last, so that what is logged of a pass is of that one."""
        assert self.weights is not None
        losses = []
        for bits, weight in sorted(self.weights.items()):
            for quantizer in self._nested:
                quantizer.at(bits)
            losses.append(weight * loss())
        return torch.stack(losses).sum()

    def _check(self, name: str, widths: Sequence[int]) -> None:
        if not self._nested:
            raise InputError(
                f"callbacks.nested.{name} is for nested quantizers, and the scheme has none: set it to null, or "
                "quantizer@scheme.weight=nested."
            )
        for quantizer in self._nested:
            if set(widths) != set(quantizer.widths):
                raise InputError(
                    f"callbacks.nested.{name} is {widths}, and the codes nest {list(quantizer.widths)}: name each of "
                    "these, and no other; a width that is left out is never trained."
                )


def _check_passes(module: CausalLMModule) -> None:
    """Refuse what cannot pass through a model several times before its backward pass."""
    name = "gradient_checkpointing" if module.gradient_checkpointing else "cuda_graphs"
    if getattr(module, name):
        raise InputError(
            f"module.{name} remembers one width of each step, and callbacks.nested.weights has several: set "
            f"module.{name}=false, or callbacks.nested.turns in the place of weights."
        )
