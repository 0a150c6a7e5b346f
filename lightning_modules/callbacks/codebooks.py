"""What happens to learned codebooks between the steps of the optimizer."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from qat.errors import InputError
from qat.transforms import codebooks


class CodebookRefresh(Callback):
    """Moves the centroids of every weight's codebook to the means of their members, and revives dead ones.

    One step of k-means after the optimizer's. At every step the codebook follows the weights, and its gradients hardly
    matter; less often, gradients move it and k-means only sets it right.

    Args:
        every_n_steps: optimizer steps between refreshes; None: never.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"callbacks.refresh.every_n_steps is {every_n_steps}; it starts at 1, null is off.")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is not None:
            _require_codebooks(pl_module, "callbacks.refresh.every_n_steps")
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # While gradients accumulate the step stays the same, and so do the weights.
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if self.every_n_steps is not None and stepped and trainer.global_step % self.every_n_steps == 0:
            refresh(pl_module)


class SoftKMeans(Callback):
    """Assigns weights to centroids softly at first, and harder from step to step (DKM, arXiv 2108.12659).

    The temperature falls geometrically from `start` to `end` over `steps` optimizer steps; from then on each weight
    goes to its nearest centroid. Evaluation and what ships are hard always. While soft, weights are mixtures of all
    centroids, so a training step takes several times as long.

    Args:
        start, end: temperatures, in squared units of the codebook, which spans about [-1, 1].
        steps: how many are soft; None: none.
    """

    def __init__(self, start: float = 1e-2, end: float = 1e-4, steps: int | None = None) -> None:
        if steps is not None and steps < 1:
            raise InputError(f"callbacks.soft.steps is {steps}; it starts at 1, null switches it off.")
        if not 0 < end <= start:
            raise InputError(f"callbacks.soft cools from start to end: {start} >= {end} > 0 does not hold.")
        self.start, self.end, self.steps = start, end, steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps is None:
            return
        _require_codebooks(pl_module, "callbacks.soft.steps")
        if self.steps >= trainer.estimated_stepping_batches:
            raise InputError(
                f"callbacks.soft ends after {self.steps} steps, the training after "
                f"{trainer.estimated_stepping_batches}: nothing would train on what ships. Shorten it, or raise "
                "trainer.max_steps."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.steps is not None:
            self._set(pl_module, self.temperature(trainer.global_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps is not None:
            self._set(pl_module, None)

    def temperature(self, step: int) -> float | None:
        """At optimizer step `step`, counted from 0; None is hard."""
        assert self.steps is not None
        if step >= self.steps:
            return None
        return float(self.start * (self.end / self.start) ** (step / max(1, self.steps - 1)))

    def _set(self, module: nn.Module, temperature: float | None) -> None:
        for _, _, quantizer in codebooks(module):
            quantizer.temperature = temperature


def _require_codebooks(model: nn.Module, option: str) -> None:
    if next(codebooks(model), None) is None:
        raise InputError(
            f"{option} is for k-means codebooks, and no weight has one: choose quantizer@scheme.weight=kmeans, or set "
            "it to null."
        )


def refresh(model: nn.Module) -> None:
    """One step of k-means for the codebook of every quantized weight of `model`, once for each shared one."""
    for layer, name, quantizer in codebooks(model):
        quantizer.refresh(layer.matrix(layer, name))
