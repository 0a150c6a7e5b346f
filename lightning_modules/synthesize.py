"""The command that lets a model write text to train on, without any data: `qat-synthesize folder=... texts=...`."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_modules.cli import command
from lightning_modules.models import LoadedModel
from lightning_modules.side_by_side import check_accelerator, check_positions, placed
from lightning_modules.synthesis import Settings, write
from qat.options import require_whole


def main() -> None:
    """Entry point of `qat-synthesize`."""
    command("synthesize", _run)


def _run(cfg: DictConfig) -> None:
    folder, chosen = Path(cfg.folder), OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(chosen, dict)
    settings = Settings(**{field.name: chosen[field.name] for field in fields(Settings)})
    check_accelerator(cfg.accelerator)
    if cfg.threads is not None:
        require_whole("threads", cfg.threads, 1)
        torch.set_num_threads(cfg.threads)
    loaded: LoadedModel = placed(instantiate(cfg.model), cfg.accelerator)
    check_positions(loaded, settings.length, "set a smaller length.")
    console = Console()
    try:
        path = write(loaded, folder, settings, console)
    except SystemExit:
        console.print("\nThe same command goes on.")
        raise
    tokens = len(np.load(path, mmap_mode="r"))
    console.print(f"{settings.texts} texts, {tokens} tokens: {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
