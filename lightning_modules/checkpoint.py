"""Checkpoints that are whole or not there, and that load without executing code."""

import errno
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from qat.atomic import replaced_file
from qat.errors import InputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old checkpoint and renames; a failure leaves the old one as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            InputError: if the disk is full or the folder cannot be written.
        """
        path = Path(path)
        try:
            with replaced_file(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except OSError as error:
            raise _explain(error, path) from error
        except RuntimeError as error:
            # torch reports a failed write of its archive as a RuntimeError, whatever the system said.
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            raise _explain(OSError(errno.EIO, "the write failed, is the disk full?"), path) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read `path` with `weights_only=True`.

        Raises:
            InputError: if the file is missing or damaged.
        """
        if not Path(path).is_file():
            raise InputError(f"There is no checkpoint at {path}.")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # unpickling damaged bytes raises almost anything
            raise InputError(
                f"The checkpoint {path} is damaged: {str(error).strip().splitlines()[0]} Delete it and run again."
            ) from error


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint, `last.ckpt`, rewritten every so many steps and when training ends.

    Args:
        dirpath: folder.
        every_n_steps: optimizer steps between checkpoints.
        save_at_end: also write one after the last step.
    """

    def __init__(self, dirpath: str, every_n_steps: int = 100, save_at_end: bool = True) -> None:
        if every_n_steps < 1:
            raise InputError(f"callbacks.checkpoint.every_n_steps is {every_n_steps}; it starts at 1.")
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps, self.save_at_end = every_n_steps, save_at_end
        self._saved_step = 0

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint now, unless this step's is there already.

        Raises:
            InputError: if a weight is no number any more; the checkpoint before is then kept.
        """
        if self._saved_step != trainer.global_step:
            named = trainer.lightning_module.named_parameters()
            broken = next((name for name, p in named if not torch.isfinite(p).all()), None)
            if broken is not None:
                kept = f"the one of step {self._saved_step} is kept" if self.path.exists() else "none is kept"
                raise InputError(
                    f"{broken} is no longer finite after step {trainer.global_step}, so no checkpoint is "
                    f"written; {kept}. Lower optimizer.lr or module.quantizer_lr and resume."
                )
            trainer.save_checkpoint(self.path)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)  # type: ignore[arg-type]
            self._saved_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The last step's is written here too: once Lightning has closed the epoch, its position is no longer this one.
        last = self.save_at_end and trainer.global_step == trainer.estimated_stepping_batches
        if last or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_at_end:
            self.save(trainer)


def _explain(error: OSError, path: Path) -> InputError:
    what = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    kept = f"The previous checkpoint {path} is intact" if path.exists() else "No checkpoint was lost"
    return InputError(
        f"Cannot write the checkpoint {path}: {what}. {kept}; free space, or set hydra.run.dir for a new run."
    )
