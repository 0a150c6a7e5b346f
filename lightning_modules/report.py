"""What a run found: a table, a JSON file, and a picture."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qat.atomic import replaced_file


class Report:
    """Rows of results, kept in `results.json` as they are measured, so that a resumed run measures none twice.

    Args:
        folder: of the run.
        title: of the table.
        resume: keep the rows of an earlier part of the same run.
        writes: whether the file is written: by one of the processes of a run.
    """

    def __init__(self, folder: Path, title: str, resume: bool = True, writes: bool = True) -> None:
        self.path = folder / "results.json"
        self.title, self.writes = title, writes
        self.rows: dict[str, dict[str, Any]] = {}
        if resume and self.path.is_file():
            self.rows = {row["row"]: row for row in json.loads(self.path.read_text())["rows"]}

    def has(self, row: str, step: int) -> bool:
        """Whether `row` was measured after `step` optimizer steps."""
        return row in self.rows and self.rows[row]["step"] == step

    def add(self, row: str, **figures: Any) -> None:
        """Keep one row, in the place of an older one of its name."""
        self.rows[row] = {"row": row} | figures
        if not self.writes:
            return
        with replaced_file(self.path) as temporary:
            temporary.write_text(json.dumps({"title": self.title, "rows": list(self.rows.values())}, indent=1) + "\n")

    def print(self, console: Console) -> None:
        """Show the table."""
        table = Table(title=self.title)
        table.add_column("model")
        for heading in ("perplexity", "bits per weight", "MiB"):
            table.add_column(heading, justify="right")
        for row in self.rows.values():
            size = row.get("mib")
            table.add_row(
                row["row"],
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_weight']:.2f}",
                "" if size is None else f"{size:.0f}",
            )
        console.print(table)


def plot_training(metrics: Path, picture: Path, title: str) -> bool:
    """Draw the loss and every layer's SQNR over the steps from a CSV of metrics; False if it holds neither."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    loss = _series(rows, "train/loss")
    layers = [name for name in rows[0] if name.startswith("sqnr/")] if rows else []
    if not loss and not layers:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    figure.suptitle(title)
    if loss:
        steps, values = zip(*loss, strict=True)
        left.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=0.8)
        left.plot(steps, _smooth(values), color="tab:blue", linewidth=1.5, label="mean of the last ten steps")
        left.legend(fontsize=8)
    left.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
    colours = dict(zip(kinds, plt.colormaps["tab10"].colors, strict=False))
    for name in layers:
        series = _series(rows, name)
        kind = name.rsplit(".", 1)[-1]
        if series:
            right.plot(*zip(*series, strict=True), color=colours.get(kind, "gray"), alpha=0.35, linewidth=0.8)
    for kind, colour in colours.items():
        right.plot([], [], color=colour, label=kind)
    right.set(xlabel="optimizer step", ylabel="SQNR of each layer's weight (dB)")
    if kinds:
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    with replaced_file(picture) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    return True


def _smooth(values: Sequence[float], window: int = 10) -> list[float]:
    """Mean of up to `window` values up to each."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _series(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    points = ((row.get("step"), row.get(name)) for row in rows)
    numbers = [(int(float(step)), float(value)) for step, value in points if step and value]
    return [(step, value) for step, value in numbers if math.isfinite(value)]
