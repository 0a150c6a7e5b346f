"""The command that measures models on a text: `qat-eval artifact=outputs/RUN/native`."""

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_modules.cli import command
from lightning_modules.data import CausalLMDataModule
from lightning_modules.evaluation import Text, evaluate, text_of, windows
from lightning_modules.evaluation.tasks import check_tasks, task_scores
from lightning_modules.models import LoadedModel
from lightning_modules.side_by_side import SideBySide, bits_of, check_positions, listed, mib_of
from qat.atomic import replaced_file
from qat.errors import InputError

Row = dict[str, Any]
# Heading of each column, what it shows, and how.
_COLUMNS = [
    ("perplexity", "perplexity", "{:.2f}"),
    ("top-1", "accuracy", "{:.1%}"),
    ("KL", "kl", "{:.4f}"),
    ("agrees", "agreement", "{:.1%}"),
    ("bits", "bits_per_weight", "{:.2f}"),
    ("MiB", "mib", "{:.0f}"),
]
_ALONE = "top-1: share of the tokens that are the likeliest. bits: per quantized weight."
_BESIDE = f"{_ALONE} KL: from the first model, nats a token. agrees: the likeliest token is that of the first model."


def main() -> None:
    """Entry point of `qat-eval`."""
    command("evaluate", _run)


def _run(cfg: DictConfig) -> None:
    _check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    models = SideBySide(cfg)
    data: CausalLMDataModule = instantiate(cfg.data, tokenizer=models.tokenizer)
    text, rows = text_of(data), []
    for loaded in models.all():
        rows.append(_row(cfg, loaded, models.reference, text))
        _save(folder, cfg, rows)  # what was measured stays, whatever comes next
    console = Console()
    console.print(_table(cfg, rows))
    console.print(f"written: {folder / 'eval.json'}", highlight=False, soft_wrap=True)


def _row(cfg: DictConfig, loaded: LoadedModel, reference: LoadedModel | None, text: Text) -> Row:
    """Every figure of one model."""
    check_positions(loaded, cfg.window, "set a smaller window.")
    packed = loaded is not reference
    compared = reference.model if packed and reference is not None else None
    how = cfg.window, cfg.stride, cfg.batch_size
    row: Row = {"model": loaded.name} | evaluate(loaded.model, text, *how, compared, loaded.name)._asdict()
    row |= {"bits_per_weight": bits_of(loaded, packed), "mib": mib_of(loaded, packed)}
    if listed(cfg.tasks):
        row["tasks"] = task_scores(loaded, listed(cfg.tasks), cfg.task_folder, cfg.task_limit, cfg.batch_size)
    return row


def _save(folder: Path, cfg: DictConfig, rows: list[Row]) -> None:
    report = {"window": cfg.window, "stride": cfg.stride, "rows": rows}
    with replaced_file(folder / "eval.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")


def _table(cfg: DictConfig, rows: list[Row]) -> Table:
    title = f"{rows[0]['tokens']} tokens, windows of {cfg.window}, {cfg.stride} apart"
    shown = [column for column in _COLUMNS if any(row[column[1]] is not None for row in rows)]
    beside = any(row["kl"] is not None for row in rows)
    table = Table(title=title, caption=_BESIDE if beside else _ALONE)
    tasks = list(rows[0].get("tasks", {}))
    table.add_column("model", overflow="fold")
    for heading in [heading for heading, *_ in shown] + tasks:
        table.add_column(heading, justify="right")
    for row in rows:
        figures = ["" if row[key] is None else form.format(row[key]) for _, key, form in shown]
        table.add_row(row["model"], *figures, *(f"{row['tasks'][task]:.4f}" for task in tasks))
    return table


def _check(cfg: DictConfig) -> None:
    """Refuse numbers before a model is loaded."""
    for key in ("window", "stride", "batch_size"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise InputError(f"{key} is {cfg[key]}; it is a whole number from 1 on.")
    list(windows(cfg.window, cfg.window, cfg.stride))
    check_tasks(listed(cfg.tasks), cfg.task_folder, cfg.task_limit)


if __name__ == "__main__":
    main()
