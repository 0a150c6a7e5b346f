"""A progress bar over the whole of training, with the time that is left."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_NOTE_EVERY_S = 1.0


class ProgressBar(LightningProgressBar):
    """One bar for all optimizer steps of a run, not one for each epoch, so that its remaining time is that of the run.

    Where output is no terminal, a line every `line_every_s` seconds says the same.

    Args:
        line_every_s: seconds between lines.
    """

    def __init__(self, line_every_s: float = 20.0) -> None:
        super().__init__()
        self.console = Console(stderr=False)
        self.line_every_s = line_every_s
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._last_line = 0.0
        self._first = 0

    def disable(self) -> None:
        self.console.quiet = True

    def enable(self) -> None:
        self.console.quiet = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        if trainer.global_step:
            left = f"at step {trainer.global_step} of {total}" if trainer.global_step < total else "no step is left"
            self.console.print(f"going on from a checkpoint: {left}", highlight=False)
        self._begin("training", total, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._advance(trainer.global_step, partial(_loss, trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            total = sum(int(n) for n in trainer.num_val_batches)
            self._begin("evaluating", total, 0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit":
            self._advance(batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, what: str, total: int, done: int) -> None:
        self._end()
        self._started = self._last_line = time.monotonic()
        self._first, self._total, self._what = done, total, what
        if self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(
                *columns,
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                speed_estimate_period=120,
            )
            self._task = self._progress.add_task(what, total=total, completed=done, note="")
            self._progress.start()

    def _advance(self, done: int, note: Callable[[], str] = str) -> None:
        """Show `done`; `note` is called when it is time to show it, because it waits for a GPU."""
        now = time.monotonic()
        every = self.line_every_s if self._progress is None else _NOTE_EVERY_S
        due = now - self._last_line >= every and done > self._first
        if due:
            self._last_line = now
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, **({"note": note()} if due else {}))
        elif due:
            left = (now - self._started) / (done - self._first) * (self._total - done)
            self.console.print(f"{self._what} {done}/{self._total}  {note()}  {left:.0f} s left", highlight=False)

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def _loss(trainer: Trainer) -> str:
    loss = trainer.callback_metrics.get("train/loss")
    return "" if loss is None else f"loss {float(loss):.3f}"
