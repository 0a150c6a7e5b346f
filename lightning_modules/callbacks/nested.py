"""Training one set of codes for several widths."""

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from qat.errors import InputError
from qat.quantizers import NestedQuantizer


class NestedBits(Callback):
    """Lets the widths of nested quantizers take turns, one for each optimizer step ("MatQuant", arXiv 2502.06786).

    MatQuant sums the losses of all widths in every step; turns give the same gradient on the average, at the cost of
    one width. Between steps, and so for evaluation, quantizers are at the width that ships.

    Args:
        turns: widths of successive steps, over and over; [8, 4, 2, 2] gives half of the steps to two bits. None: every
            width of each quantizer in turn.
    """

    def __init__(self, turns: Sequence[int] | None = None) -> None:
        self.turns = turns
        self._nested: list[NestedQuantizer] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._nested = [module for module in pl_module.modules() if isinstance(module, NestedQuantizer)]
        if self.turns is None:
            return
        if not self._nested:
            raise InputError(
                "callbacks.nested.turns is for nested quantizers, and the scheme has none: set it to null, or "
                "quantizer@scheme.weight=nested."
            )
        for quantizer in self._nested:
            if set(self.turns) != set(quantizer.widths):
                raise InputError(
                    f"callbacks.nested.turns is {list(self.turns)}, and the codes nest {list(quantizer.widths)}: name "
                    "each of these, and no other; a width that never has a turn is never trained."
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for quantizer in self._nested:
            turns = self.turns or quantizer.widths
            quantizer.at(turns[trainer.global_step % len(turns)])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for quantizer in self._nested:
            quantizer.at(quantizer.widths[0])
