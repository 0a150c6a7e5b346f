"""A running average of the weights, which is what is evaluated and shipped."""

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_modules.callbacks.precision import PrecisionSchedule
from qat.errors import InputError
from qat.quantizers.mask import Masked
from qat.transforms.masks import hold_masks_of


class WeightEMA(WeightAveraging):
    """Lightning's average of weights as an exponential one, w_ema <- decay w_ema + (1 - decay) w, of quantized models.

    What is learned is averaged: weights, log2 of scales (so scales by their geometric mean), zero points before they
    are rounded, and codebooks entry by entry; the average is then quantized as any weight is. Buffers, which are static
    scales and masks of pruned weights, are those of the last step. Validation sees the average, and when training ends
    it takes the place of the weights, so that it is what is evaluated, exported and shipped. Checkpoints hold both, and
    a resumed run goes on with the same bits. It takes the memory of the weights once more.

    Args:
        decay: between 0 and 1, such as 0.999; None: no average.
        every_n_steps: optimizer steps between two updates of the average.
        start_step: the first optimizer step, counted from 0, after which it is updated; it starts as the weights are
            then. With `callbacks.precision`, after the last change of bits.
        device: where it is kept, such as `cpu`; None: beside the model.

    Raises:
        InputError: if an option is out of its range.
    """

    _average_model: AveragedModel | None

    def __init__(
        self, decay: float | None = None, every_n_steps: int = 1, start_step: int = 0, device: str | None = None
    ) -> None:
        if decay is not None and not 0 < decay < 1:
            raise InputError(f"callbacks.average.decay is {decay}; it lies between 0 and 1, and null switches it off.")
        if every_n_steps < 1 or start_step < 0:
            raise InputError(
                f"callbacks.average has every_n_steps={every_n_steps}, which starts at 1, and start_step={start_step}, "
                "which starts at 0."
            )
        average = None if decay is None else get_ema_multi_avg_fn(decay)
        # Without buffers: bytes and masks have no average.
        super().__init__(device=device, use_buffers=False, multi_avg_fn=average)
        self.decay, self.every_n_steps, self.start_step = decay, every_n_steps, start_step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.decay is None or stage != "fit":
            return
        _check_dtypes(pl_module)
        self._device = self._device or trainer.strategy.root_device
        # A teacher would be copied with the module.
        distillation, pl_module.distillation = pl_module.distillation, None  # type: ignore[assignment]
        super().setup(trainer, pl_module, stage)
        pl_module.distillation = distillation  # type: ignore[assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        if self.decay is not None and self.start_step >= steps:
            raise InputError(
                f"callbacks.average starts after step {self.start_step}, the training ends after {steps}: lower its "
                "start_step."
            )
        for schedule in (c for c in trainer.callbacks if self.decay is not None and isinstance(c, PrecisionSchedule)):
            last = schedule.last_change(steps)
            if self.start_step < last:
                raise InputError(
                    f"callbacks.average would mix scales of grids that callbacks.precision changes until step {last}: "
                    f"set callbacks.average.start_step={last}."
                )

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if self._average_model is None or step_idx is None or step_idx < self.start_step:
            return False
        return (step_idx - self.start_step) % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.should_update(trainer.global_step - 1):
            self._take_buffers(pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_average:
            self._take_buffers(pl_module)
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_average:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights, which the last checkpoint is still to be written of."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the average take the place of the weights, and forget it: what follows has another shape."""
        if self._has_average:
            self._take_buffers(pl_module)
            self._copy_average_to_current(pl_module)
        self._average_model = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            self._take_buffers(pl_module)
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up weights and average.

        Raises:
            InputError: if the checkpoint holds an average and this run none, or the other way round.
        """
        if (self.decay is not None) != ("current_model_state" in checkpoint):
            raise InputError(
                "The checkpoint holds an average of weights, and this run none: set callbacks.average.decay as the "
                "run before had it."
                if self.decay is None
                else "The checkpoint holds no average of weights: set callbacks.average.decay=null, or start a new run."
            )
        if self._average_model is not None:
            hold_masks_of(self._average_model.module, checkpoint["state_dict"])
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @property
    def _has_average(self) -> bool:
        """Whether there is one yet: before `start_step` its Parameters are those that training started from."""
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    @torch.no_grad()
    def _take_buffers(self, pl_module: LightningModule) -> None:
        """Give the average the buffers of the model, masks included, which may come while it trains."""
        assert self._average_model is not None
        averaged = self._average_model.module
        for own, other in zip(pl_module.modules(), averaged.modules(), strict=True):
            if isinstance(own, Masked) and isinstance(other, Masked) and (own.mask is None) != (other.mask is None):
                other.mask = None if own.mask is None else own.mask.to(self._device, copy=True)
        for buffer, current in zip(averaged.buffers(), pl_module.buffers(), strict=True):
            buffer.copy_(current)


def _check_dtypes(module: nn.Module) -> None:
    """Refuse to average what is kept in 16 bits, where a thousandth of a step is lost.

    Raises:
        InputError: if so.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and torch.finfo(parameter.dtype).bits < 32:
            raise InputError(
                f"callbacks.average would average {name} in {str(parameter.dtype).removeprefix('torch.')}, which loses "
                "small steps: set trainer.precision=bf16-mixed with model.dtype=float32, or its decay to null."
            )
