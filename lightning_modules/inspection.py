"""The command that says what a quantized checkpoint holds: `qat-inspect outputs/RUN/native`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules.cli import command
from lightning_modules.models import load_hf
from qat.export.artifact import bits_per_weight
from qat.export.inspection import WeightReport, inspect
from qat.export.loading import load, target_of
from qat.transforms.layers import conv1d_to_linear

# Of a table that goes into a file.
_WIDTH = 120


def main() -> None:
    """Entry point of `qat-inspect`; a word that is no option is the checkpoint."""
    words = sys.argv[1:]
    sys.argv[1:] = [word if "=" in word or word.startswith("-") else f"artifact='{word}'" for word in words]
    command("inspection", _run)


def _run(cfg: DictConfig) -> None:
    folder, console = Path(cfg.artifact).expanduser(), Console()
    if not console.is_terminal:
        console.width = _WIDTH
    target = target_of(folder)
    model = load(folder, trust_remote_code=cfg.trust_remote_code)
    reference = None if cfg.reference is None else _weights(cfg.reference, cfg.trust_remote_code)
    reports = list(inspect(model, reference))
    title = f"{folder}: {target.title if target else 'full precision'}"
    console.print(_table(reports, title, reference is not None))
    if reports:
        console.print(f"{bits_per_weight(model):.3f} bits a quantized weight, all told")
    flagged = [report for report in reports if report.flags]
    for report in flagged:
        console.print(f"{report.name}: {', '.join(report.flags)}", style="bold", highlight=False, soft_wrap=True)
    if not flagged:
        console.print("Every layer is what the configuration says.")


def _weights(name: str, trust_remote_code: bool) -> Mapping[str, Tensor]:
    """The Parameters of a model in full precision, linear layers as `[out, in]`."""
    model: Any = load_hf(name, trust_remote_code=trust_remote_code).model
    conv1d_to_linear(model)
    return dict(model.named_parameters(remove_duplicate=False))


def _table(reports: list[WeightReport], title: str, compared: bool) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("format", "granularity", "scale"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits", "codes used", *(["SQNR, dB"] if compared else [])):
        table.add_column(heading, justify="right")
    for report in reports:
        figures = [f"{report.bits_per_weight:.3f}", f"{report.code_use:.0%}"]
        if compared:
            figures.append("" if report.sqnr is None else f"{report.sqnr:.1f}")
        mark = "!" if report.flags else ""
        table.add_row(
            report.name.removesuffix(".weight") + mark, report.format, report.granularity, report.scale, *figures
        )
    return table


if __name__ == "__main__":
    main()
