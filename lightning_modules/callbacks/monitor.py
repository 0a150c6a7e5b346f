"""How well each quantizer represents its weights while they train."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from qat.nn import QuantLinear
from qat.numerics.metrics import code_use, sqnr
from qat.quantizers import Quantizer
from qat.transforms import quant_linears


class QuantizerMonitor(Callback):
    """Logs for every quantized layer: SQNR in dB, share of clipped weights, share of codes in use.

    Args:
        every_n_steps: optimizer steps between measurements; the first and the last step are always measured.
        per_layer: log every layer; otherwise only the mean, and the least SQNR.
    """

    def __init__(self, every_n_steps: int = 20, per_layer: bool = True) -> None:
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self._last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
        if trainer.global_step % self.every_n_steps == 0 or last:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        measured = {
            name.removeprefix("model."): measure(layer)
            for name, layer in quant_linears(pl_module)
            if isinstance(layer.weight_quantizer, Quantizer)
        }
        if not measured:
            return
        metrics: dict[str, float] = {}
        for quantity in ("sqnr", "clipped", "code_use"):
            values = [m[quantity] for m in measured.values() if math.isfinite(m[quantity])]
            if values:
                metrics[f"quantizers/{quantity}"] = sum(values) / len(values)
            if self.per_layer:
                metrics |= {f"{quantity}/{name}": m[quantity] for name, m in measured.items()}
        finite = [m["sqnr"] for m in measured.values() if math.isfinite(m["sqnr"])]
        if finite:
            metrics["quantizers/least_sqnr"] = min(finite)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


@torch.no_grad()
def measure(layer: QuantLinear) -> dict[str, float]:
    """SQNR (dB), share of weights beyond the grid, and share of codes in use, of one layer's weight."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    assert isinstance(quantizer, Quantizer)
    q = quantizer.quantize(weight)
    beyond = torch.zeros(())
    if q.format.saturates:
        half_step_out = quantizer.granularity.view((q.dequantize().float() - weight.float()).abs())
        beyond = (half_step_out > 0.5 * q.qparams.for_view().scale * (1 + 1e-5)).float().mean()
    return {"sqnr": sqnr(weight, q.dequantize()), "clipped": beyond.item(), "code_use": code_use(q)}
