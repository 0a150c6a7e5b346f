"""Weights that are pruned little by little while they train."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from qat.errors import InputError
from qat.nn import QuantLayer
from qat.numerics.sparsity import check_divides, gradual_mask, magnitude_scores, parse_pattern
from qat.transforms.masks import prunable, require_zeros, set_mask


class PruneSchedule(Callback):
    """Prunes the weights of least magnitude, fast at first and then more and more slowly (arXiv 1710.01878).

    The share of zeros of each layer is sparsity * (1 - (1 - (step - begin) / (end - begin))^3) between the two steps,
    and `sparsity` from then on. An N:M pattern fills up in the same way. Checkpoints carry the masks.

    Args:
        sparsity: share of zeros in the end; None: nothing is pruned.
        pattern: `unstructured`, `2:4` or `4:8`.
        begin_step, end_step: optimizer steps between which pruning goes on; end_step None: two thirds of the training.
        every_n_steps: optimizer steps between two prunings.
        exclude: names of layers that stay dense, with shell wildcards.
        dense_gradient: let pruned weights go on learning, so that they may return; otherwise pruned is pruned.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        begin_step: int = 0,
        end_step: int | None = None,
        every_n_steps: int = 10,
        exclude: str | Sequence[str] = (),
        dense_gradient: bool = False,
    ) -> None:
        self.sparsity, self.exclude, self.dense_gradient = sparsity, exclude, dense_gradient
        self.begin_step, self.end_step, self.every_n_steps = begin_step, end_step, every_n_steps
        if every_n_steps < 1 or begin_step < 0 or (end_step is not None and end_step < begin_step):
            raise InputError(
                f"callbacks.prune goes every {every_n_steps} steps from {begin_step} to {end_step}: every_n_steps "
                "starts at 1, begin_step at 0, and end_step comes after it."
            )
        if sparsity is not None:
            self.pattern = parse_pattern(pattern, sparsity)
        self._layers: dict[str, QuantLayer] = {}
        self._pruned_at: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers, before a checkpoint brings their masks."""
        if self.sparsity is None or stage != "fit":
            return
        model: Any = pl_module.model
        self._layers = prunable(model, self.exclude)
        require_zeros(self._layers)
        for layer in self._layers.values():
            for weight in layer.weights():
                check_divides(self.pattern, weight.matrix.shape[1])
                weight.quantizer.dense_gradient = self.dense_gradient

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self._end = int(2 * steps // 3) if self.end_step is None else self.end_step
        if self.sparsity is not None and not self.begin_step <= self._end < steps:
            raise InputError(
                f"callbacks.prune goes from step {self.begin_step} to {self._end}, the training to {steps}: nothing "
                "would train on what ships. Shorten it, or raise trainer.max_steps."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # While gradients accumulate the step stays the same.
        if self.sparsity is not None and self._is_due(trainer.global_step) and self._pruned_at != trainer.global_step:
            self._pruned_at = trainer.global_step
            self._prune(self.share(trainer.global_step))

    def share(self, step: int) -> float:
        """The share of zeros from optimizer step `step` on, counted from 0."""
        assert self.sparsity is not None
        if step < self.begin_step:
            return 0.0
        left = max(0.0, (self._end - step) / max(1, self._end - self.begin_step))
        return self.sparsity * (1 - left**3)

    def _is_due(self, step: int) -> bool:
        since = step - self.begin_step
        return step == self._end or (0 < since < self._end - self.begin_step and since % self.every_n_steps == 0)

    @torch.no_grad()
    def _prune(self, share: float) -> None:
        assert self.sparsity is not None
        for name, layer in self._layers.items():
            for weight in layer.weights():
                # What is pruned scores zero, unless it goes on learning.
                own = weight.matrix if self.dense_gradient else weight.quantizer.masked(weight.matrix)
                mask = gradual_mask(magnitude_scores(own), self.pattern, self.sparsity, share, "matrix")
                set_mask(name, layer, weight.name, mask)
