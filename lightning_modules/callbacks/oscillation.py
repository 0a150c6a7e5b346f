"""Weights that do not settle on a code: damped, and frozen."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from qat.errors import InputError
from qat.quantizers.oscillation import CodeHistory, check_settles, codes_of, dampening
from qat.transforms.build import found_at
from qat.transforms.layers import QuantizedWeight, quantized_weights


class OscillationDampening(Callback):
    """Draws weights towards the values that they are rounded to (Overcoming Oscillations, arXiv 2203.11086).

    Adds strength * sum over weights of |w_hat - clip(w)|^2 to the loss, see `qat.quantizers.oscillation.dampening`;
    only w learns from it. The strength rises from 0 to `strength` along half a cosine over the training, because
    weights have to move first. The gradient is added once a step, just before gradients are clipped, so that nothing is
    kept for a backward pass: it takes the memory of one weight, and a few passes over all of them.
    `train/dampening` is what is added to the loss.

    Args:
        strength: at the end, in units of the loss per squared unit of weights; None: none.
    """

    def __init__(self, strength: float | None = None) -> None:
        if strength is not None and not strength > 0:
            raise InputError(f"callbacks.dampening.strength is {strength}; it is positive, and null switches it off.")
        self.strength = strength
        self._weights: list[QuantizedWeight] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strength is None:
            return
        self._weights = _required_weights(pl_module, "callbacks.dampening.strength")
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                "callbacks.dampening does not know the factor of float16 gradients: set trainer.precision=bf16-mixed, "
                "or its strength to null."
            )
        self._steps = trainer.estimated_stepping_batches

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.strength is None:
            return
        strength = self.strength_at(trainer.global_step)
        total = torch.zeros((), device=pl_module.device)
        for weight in self._weights:
            grad = weight.parameter.grad
            if grad is not None and weight.quantizer.enabled:
                value, slope = dampening(weight.quantizer, weight.matrix)
                total += value
                grad.add_(weight.layer.from_matrix(weight.name, slope), alpha=strength)
        pl_module.log("train/dampening", total * strength)

    def strength_at(self, step: int) -> float:
        """At optimizer step `step`, counted from 0; the last has all of it."""
        assert self.strength is not None
        return self.strength * (1 - math.cos(math.pi * min(1.0, step / max(1, self._steps - 1)))) / 2


class OscillationFreezing(Callback):
    """Freezes weights whose codes go back and forth to their rounded running mean (arXiv 2203.11086).

    How often a code turned back is averaged over steps with `momentum`; beyond a threshold it is frozen, see
    `qat.quantizers.oscillation.CodeHistory`. The threshold goes from `start_threshold` to `threshold` along half a
    cosine over the training, so that at first only the worst are frozen. A frozen weight is put back onto its code
    after every step, whatever momentum or weight decay did to it; scales and codebooks go on learning beneath. A grid
    that changes (`callbacks.precision`) sets it free. It takes 6 bytes a weight, in checkpoints too, and some
    twenty passes over bytes and halves of all weights a step. `train/frozen` is the share of weights that are frozen.

    Args:
        threshold: share of the steps, in the end; below `momentum`, one turn is enough. None: nothing is frozen.
        start_threshold: in the beginning; None: the same.
        momentum: share of a step in the running means, 0.001 (what float16 resolves) to 1.
    """

    def __init__(
        self, threshold: float | None = None, start_threshold: float | None = None, momentum: float = 0.01
    ) -> None:
        start = threshold if start_threshold is None else start_threshold
        if threshold is not None and start is not None and not 0 < threshold <= start < 1:
            raise InputError(
                f"callbacks.freezing goes from start_threshold={start} to threshold={threshold}: they are shares of "
                "the steps, 0 < threshold <= start_threshold < 1; a threshold of null switches it off."
            )
        if not 0.001 <= momentum <= 1:
            raise InputError(f"callbacks.freezing.momentum is {momentum}; it lies between 0.001 and 1: set it to 0.01.")
        self.threshold, self.start_threshold, self.momentum = threshold, start, momentum
        self._weights: dict[str, QuantizedWeight] = {}
        self._histories: dict[str, CodeHistory] = {}
        self._loaded: dict[str, Any] = {}
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.threshold is None:
            return
        self._steps, self._last_step = trainer.estimated_stepping_batches, trainer.global_step
        weights = _required_weights(pl_module, "callbacks.freezing.threshold")
        self._weights = {weight.label: weight for weight in weights}
        for label, weight in self._weights.items():
            with found_at(label):
                check_settles(weight.quantizer)
            self._histories[label] = _begun(weight)
            if label in self._loaded:
                self._histories[label].load_state_dict(self._loaded[label])
        self._loaded = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # While gradients accumulate the step stays the same, and so do the weights.
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if self.threshold is None or not stepped:
            return
        threshold = self.threshold_at(trainer.global_step - 1)
        frozen = torch.zeros((), device=pl_module.device)
        for label, weight in self._weights.items():
            # In full precision (callbacks.precision.delay_steps) a weight is on no code yet.
            if self._histories[label].format != weight.quantizer.format or not weight.quantizer.enabled:
                self._histories[label] = _begun(weight)
            frozen += self._step(weight, self._histories[label], threshold)
        pl_module.log("train/frozen", frozen / sum(history.codes.numel() for history in self._histories.values()))

    def threshold_at(self, step: int) -> float:
        """At optimizer step `step`, counted from 0."""
        assert self.threshold is not None
        assert self.start_threshold is not None
        left = (1 + math.cos(math.pi * min(1.0, step / max(1, self._steps - 1)))) / 2
        return self.threshold + (self.start_threshold - self.threshold) * left

    def state_dict(self) -> dict[str, Any]:
        return {label: history.state_dict() for label, history in self._histories.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _step(self, weight: QuantizedWeight, history: CodeHistory, threshold: float) -> torch.Tensor:
        """Update `history`, hold what is frozen, and count it."""
        history.update(codes_of(weight.quantizer, weight.matrix), threshold, self.momentum)
        weight.layer.write(weight.name, history.held(weight.matrix, weight.quantizer))
        return history.frozen.sum()


def _begun(weight: QuantizedWeight) -> CodeHistory:
    return CodeHistory(weight.quantizer.format, codes_of(weight.quantizer, weight.matrix))


def _required_weights(module: LightningModule, option: str) -> list[QuantizedWeight]:
    found = list(quantized_weights(module))
    if not found:
        raise InputError(
            f"{option} is for quantized weights, and the scheme has none: choose scheme=w4, or set it to null."
        )
    return found
