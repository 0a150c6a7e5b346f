"""The command that plans mixed precision: `qat-plan budget=3.5 signal=kl`, or `python -m lightning_modules.plan`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_modules.cli import command, config_dir
from lightning_modules.models import LoadedModel
from qat.errors import InputError
from qat.planning import Budget, Candidate, Plan, draw, plan, write_scheme


def main() -> None:
    """Entry point of `qat-plan`."""
    command("plan", _run)


def _run(cfg: DictConfig) -> None:
    _check(cfg)
    candidates = _candidates(cfg)
    OmegaConf.resolve(cfg)
    budget = Budget(cfg.budget, cfg.unit, cfg.ms and dict(cfg.ms), cfg.per)
    pl.seed_everything(cfg.seed, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    loaded: LoadedModel = instantiate(cfg.model)
    if cfg.accelerator == "auto" and torch.cuda.is_available():
        loaded.model.cuda()
    batches = [] if cfg.signal == "entropy" else _batches(cfg, loaded)
    rows = Path(cfg.folder) / "rows"
    with _saying_how_to_go_on(rows):
        found = plan(
            loaded.model,
            batches,
            budget,
            candidates,
            cfg.signal,
            fused=OmegaConf.to_container(cfg.locked),
            allow=OmegaConf.to_container(cfg.allow),
            exclude=OmegaConf.to_container(cfg.exclude),
            folder=rows,
            rounding=cfg.rounding,
        )
    _write(found, loaded.name, Path(cfg.folder), cfg.name)


@contextmanager
def _saying_how_to_go_on(rows: Path) -> Iterator[None]:
    try:
        yield
    except SystemExit:
        print(f"\nStopped. The same command goes on: what was measured is kept in {rows}.", flush=True)
        raise


def _batches(cfg: DictConfig, loaded: LoadedModel) -> list[dict[str, torch.Tensor]]:
    data: pl.LightningDataModule = instantiate(cfg.data, tokenizer=loaded.tokenizer)
    data.setup()
    return list(islice(data.train_dataloader(), cfg.calibration_batches))


def _candidates(cfg: DictConfig) -> dict[str, Candidate]:
    """Every candidate, with the option of the group `quantizer` that it was chosen by."""
    choices = HydraConfig.get().runtime.choices
    found = {}
    for name, own in cfg.candidates.items():
        if own is None:
            continue  # set to null: not wanted
        option = choices.get(f"quantizer@candidates.{name}")
        if option is None:
            raise InputError(f"The candidate '{name}' has no quantizer: add +quantizer@candidates.{name}=lsq.")
        options = {key: value for key, value in OmegaConf.to_container(own, resolve=True).items() if key[0] != "_"}
        found[name] = Candidate(instantiate(own), option, options)
    return found


def _write(found: Plan, model: str, folder: Path, name: str) -> None:
    console = Console()
    found.save(folder / f"{name}.json")
    picture = draw(found, folder / f"{name}.png", model)
    write_scheme(found, folder, name)
    counts = {c: sum(own == c for own in found.assignment.values()) for c in found.candidates}
    chosen = ", ".join(f"{count} {candidate}" for candidate, count in counts.items() if count)
    signal = found.signal if found.rounding == "nearest" else f"{found.signal} for {found.rounding}"
    lines = [
        f"{found.bits_per_weight:.3f} bits per weight, planned by {signal}: {chosen}",
        f"picture: {picture}",
        f"python train.py --config-dir {folder} scheme={name}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _check(cfg: Any) -> None:
    """Refuse what would fail later, or be silently something else."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(cfg.name)):
        raise InputError(f"name is '{cfg.name}': take letters, digits, and . _ - between them.")
    if (config_dir() / "scheme" / f"{cfg.name}.yaml").is_file():
        raise InputError(f"There is a scheme '{cfg.name}' already, which would be taken instead: choose another name.")
    if not isinstance(cfg.budget, int | float):
        raise InputError(f"budget is '{cfg.budget}': it is a number of {cfg.unit}.")
    if cfg.accelerator not in ("auto", "cpu"):
        raise InputError(f"accelerator is '{cfg.accelerator}': choose auto or cpu.")
    if not isinstance(cfg.calibration_batches, int) or cfg.calibration_batches < 1:
        raise InputError(f"calibration_batches is {cfg.calibration_batches}; it is a whole number from 1 on.")


if __name__ == "__main__":
    main()
