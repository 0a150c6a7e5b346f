"""A CSV logger that a resumed run continues."""

import csv
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from qat.atomic import replaced_file


class CSVLogger(Logger):
    """Writes `metrics.csv`, one row a step, and keeps what an earlier part of the same run wrote.

    Lightning's own deletes the file when a run starts in a folder that was used before.

    Args:
        save_dir: folder of the run.
        resume: keep the rows of an earlier part of the same run.
        flush_every_s: seconds between writes; the file is written whole.
    """

    def __init__(self, save_dir: str, resume: bool = True, flush_every_s: float = 10.0) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._every, self._written = flush_every_s, time.monotonic()
        self._rows: dict[int, dict[str, Any]] = {}
        if resume and self.path.is_file():
            with self.path.open(newline="") as file:
                self._rows = {
                    int(row["step"]): {k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)
                }

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return os.fspath(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> "CSVLogger":
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The composed configuration is kept by Hydra beside the metrics."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._rows.setdefault(step or 0, {}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write all rows, if the last time is long enough ago: Lightning asks after every step."""
        if time.monotonic() - self._written >= self._every:
            self._write()

    def _write(self) -> None:
        if not self._rows:
            return
        columns = dict.fromkeys(key for row in self._rows.values() for key in row)
        with replaced_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *(c for c in columns if c != "step")], restval="")
            writer.writeheader()
            writer.writerows({**row, "step": step} for step, row in sorted(self._rows.items()))
        self._written = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write()

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._write()
