"""How well each quantizer represents its weights and activations while they train."""

import math
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.errors import InputError
from qat.nn.kv_quantizer import kv_layers
from qat.numerics.metrics import clipped_share, code_entropy, code_use, entropy_coded_bits, sqnr
from qat.numerics.qtensor import QuantizedTensor
from qat.quantizers import Quantizer
from qat.transforms import quant_layers

Figures = dict[str, float]


class QuantizerMonitor(Callback):
    """Logs for every quantizer: SQNR in dB, share of clipped values, and of weights the share of codes in use,
    the entropy of the codes in bits, and the bits per weight if the codes were stored in as few bits as that.

    Weights are measured after a step, activations on the batch of the step that follows.

    Args:
        every_n_steps: optimizer steps between measurements; weights are measured at the first and the last step too.
        per_layer: log every layer; otherwise only the mean, and the least SQNR.
    """

    def __init__(self, every_n_steps: int = 20, per_layer: bool = True) -> None:
        if every_n_steps < 1:
            raise InputError(f"callbacks.monitor.every_n_steps is {every_n_steps}; it starts at 1.")
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self._measured: dict[str, int] = {}
        self._hooks: list[RemovableHandle] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._due("activations", trainer.global_step):
            return
        found: dict[str, Figures] = {}
        for name, quantizer in _activation_quantizers(pl_module):
            self._hooks.append(quantizer.register_forward_hook(partial(_measure_activation, found, name)))
        self._found, self._found_at = found, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._hooks:
            self._remove_hooks()
            self._log(trainer, "activations", self._found, self._found_at)
        if self._due("weights", trainer.global_step):
            self._log_weights(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_weights(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._measured["weights"] != trainer.global_step:
            self._log_weights(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def _due(self, what: str, step: int) -> bool:
        """Whether `step` is one to measure at, and was not measured yet (with accumulation it comes back)."""
        return step % self.every_n_steps == 0 and self._measured.get(what) != step

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _log_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measured = {
            _label(name, weight_name): measure_weight(quantizer, matrix)
            for name, layer in quant_layers(pl_module)
            for weight_name, matrix, quantizer in layer.weights()
            if isinstance(quantizer, Quantizer)
        }
        self._log(trainer, "weights", measured, trainer.global_step)

    def _log(self, trainer: Trainer, what: str, measured: dict[str, Figures], step: int) -> None:
        self._measured[what] = step
        group = "quantizers" if what == "weights" else what
        metrics: dict[str, float] = {}
        for quantity in ("sqnr", "clipped", "code_use", "entropy", "effective_bits"):
            own = {name: figures[quantity] for name, figures in measured.items() if quantity in figures}
            finite = [value for value in own.values() if math.isfinite(value)]
            if finite:
                metrics[f"{group}/{quantity}"] = sum(finite) / len(finite)
            if finite and quantity == "sqnr":
                metrics[f"{group}/least_sqnr"] = min(finite)
            if self.per_layer:
                metrics |= {f"{quantity}/{name}": value for name, value in own.items()}
        if metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)


def _label(layer: str, weight: str) -> str:
    """What the figures of a weight are called: as its layer, if it has but one."""
    return layer.removeprefix("model.") + ("" if weight == "weight" else f".{weight}")


@torch.no_grad()
def measure_weight(quantizer: Quantizer, weight: Tensor) -> Figures:
    """SQNR (dB), shares of weights beyond the grid and of codes in use, entropy (bits a code), effective bits."""
    q = quantizer.quantize(weight)
    return {
        "sqnr": sqnr(weight, q.dequantize()),
        "clipped": clipped_share(weight, q),
        "code_use": code_use(q),
        "entropy": code_entropy(q).mean().item(),
        "effective_bits": entropy_coded_bits(q) / q.shape.numel(),
    }


@torch.no_grad()
def _measure_activation(
    found: dict[str, Figures], name: str, quantizer: Quantizer, args: tuple[Tensor], output: Tensor
) -> None:
    (x,) = args
    q: QuantizedTensor = quantizer.quantize(x)
    found[name] = {"sqnr": sqnr(x, output), "clipped": clipped_share(x, q)}


def _activation_quantizers(module: nn.Module) -> list[tuple[str, Quantizer]]:
    """Those of inputs, outputs, keys and values, with what their figures are called."""
    cached = [
        (f"{name.removeprefix('model.')}.{role}", quantizer)
        for name, _, kv in kv_layers(module)
        for role, quantizer in (("key", kv.key_quantizer), ("value", kv.value_quantizer))
        if isinstance(quantizer, Quantizer)
    ]
    return cached + [
        (f"{name.removeprefix('model.')}.{role}", quantizer)
        for name, layer in quant_layers(module)
        for role, quantizer in (("input", layer.input_quantizer), ("output", layer.output_quantizer))
        if isinstance(quantizer, Quantizer)
    ]
