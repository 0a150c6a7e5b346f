"""The command that ships what is quantized already: `qat-export artifact=outputs/RUN/native export=gptq`."""

import logging
import shlex
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor, nn

from lightning_modules.cli import command
from lightning_modules.data import CausalLMDataModule
from lightning_modules.models import tokenizer_of
from lightning_modules.shipping import Probe, check_shipped, engine_line, probe_ids, write_reports
from qat.errors import InputError
from qat.export.card import Recipe
from qat.export.loading import load
from qat.export.targets import Target
from qat.kernels.quantized_linear import fallback


def main() -> None:
    """Entry point of `qat-export`."""
    command("export", _run)


def _run(cfg: DictConfig) -> None:
    # It multiplies only to compare; how fast that is matters to who serves.
    logging.getLogger(fallback.__name__).setLevel(logging.ERROR)
    targets: dict[str, Target] = instantiate(cfg.export)
    if not targets:
        raise InputError("There is nothing to export to: choose export=gptq, or several, export=[gptq,native].")
    OmegaConf.resolve(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    source, console = Path(cfg.artifact).expanduser(), Console()
    model = load(source, trust_remote_code=cfg.trust_remote_code)
    for target in targets.values():
        target.check(model)
    tokenizer = tokenizer_of(str(source), cfg.trust_remote_code)
    data: CausalLMDataModule = instantiate(cfg.data, tokenizer=tokenizer)
    data.setup()
    ids = probe_ids(next(iter(data.val_dataloader())))
    probe = Probe(ids, _logits(model, ids))
    for name, target in targets.items():
        folder = target.write(model, Path(HydraConfig.get().runtime.output_dir) / name, tokenizer)
        read = target.read(folder, cfg.trust_remote_code)
        report = check_shipped(target, folder, model, read, probe, lambda model: _logits(model, ids))
        how = shlex.join(["qat-export", *HydraConfig.get().overrides.task])
        write_reports(folder, Recipe(str(source), f"exported as {target.title}", how), [], report)
        said = f"{folder}: the same logits as {source}\n  {engine_line(report)}"
        console.print(said, highlight=False, soft_wrap=True)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    causal_lm: Any = model
    found: Tensor = causal_lm(input_ids=ids, use_cache=False).logits
    return found


if __name__ == "__main__":
    main()
