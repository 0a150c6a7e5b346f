"""Stopping on request without losing a step."""

import signal
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_modules.checkpoint import LastCheckpoint

_AGREE_EVERY = 10  # steps between which the processes of a run ask each other, which waits for a GPU


class Stopped(Exception):
    """Training stopped on a signal, after its state was saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"Stopped at step {step} on {signal.Signals(signal_number).name}; everything is saved.")
        self.signal_number = signal_number


class GracefulStop(Callback):
    """On SIGINT or SIGTERM, finishes the optimizer step, writes a checkpoint, and raises `Stopped`.

    Where a run has several processes they stop together, after ten steps at most.

    A second signal stops at once, back to the last checkpoint.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Between two batches of one optimizer step the gradients are not in any checkpoint: wait for the step.
        stepped = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        if stepped and (trainer.world_size == 1 or trainer.global_step % _AGREE_EVERY == 0):
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self._agree(trainer)
        if self._received is None:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer)
        raise Stopped(self._received, trainer.global_step)

    def _agree(self, trainer: Trainer) -> None:
        """All processes of a run stop at the same step, whichever of them a signal reached."""
        found = torch.tensor(self._received or 0, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(found, reduce_op="max"))
        self._received = number or None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise SystemExit(128 + number)
        self._received = number
        print(f"\n{signal.Signals(number).name}: saving after this step; once more to stop at once.", flush=True)
