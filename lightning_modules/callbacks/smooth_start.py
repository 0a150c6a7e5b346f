"""Activations that are quantized little by little."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from qat.errors import InputError
from qat.nn import QuantLayer
from qat.quantizers import Quantizer


class SmoothStart(Callback):
    """Lets training see activations (and keys, values) in full precision first, then more and more of their error.

    x <- x + strength (x_hat - x), where strength is 0 for `delay_steps` optimizer steps and then rises linearly to 1
    over `ramp_steps`. Weights are quantized from the start. Evaluation always sees what ships, strength 1. Compiled
    blocks are one graph until then and another one after it, which does not know of strengths any more.

    Args:
        delay_steps: steps without quantized activations.
        ramp_steps: steps from none to all of the quantization error; 0 switches at once.
    """

    def __init__(self, delay_steps: int = 0, ramp_steps: int = 0) -> None:
        if delay_steps < 0 or ramp_steps < 0:
            raise InputError(f"callbacks.smooth_start has {delay_steps} and {ramp_steps} steps; they start at 0.")
        self.delay_steps, self.ramp_steps = delay_steps, ramp_steps
        self._quantizers: list[Quantizer] = []
        self._strength = torch.zeros(())

    def strength(self, step: float) -> float:
        """Share of the quantization error that the optimizer step number `step` sees."""
        return min(1.0, max(0.0, (step + 1 - self.delay_steps) / (self.ramp_steps + 1)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if self.strength(steps - 1) < 1:
            raise InputError(
                f"callbacks.smooth_start ends after {self.delay_steps + self.ramp_steps} steps, the training after "
                f"{steps}: nothing would train on what ships. Shorten it, or raise trainer.max_steps."
            )
        if not self.delay_steps and not self.ramp_steps:
            return
        self._quantizers = activation_quantizers(pl_module)
        if not self._quantizers:
            raise InputError(
                "callbacks.smooth_start is for activations, keys and values, and the scheme quantizes none: choose "
                "scheme=w4a8, or leave its steps 0."
            )
        self._strength = torch.zeros((), device=pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strength = self.strength(trainer.global_step)
        self._strength.fill_(strength)
        for quantizer in self._quantizers:
            quantizer.strength = self._strength if strength < 1 else None


def activation_quantizers(model: nn.Module) -> list[Quantizer]:
    """Every quantizer of `model` but those of weights and gradients."""
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    others = {id(layer.grad_quantizer) for layer in layers}
    others |= {id(weight.quantizer) for layer in layers for weight in layer.weights()}
    return [module for module in model.modules() if isinstance(module, Quantizer) and id(module) not in others]
