"""What a run refuses before it computes anything: numbers, models and machines that do not fit."""

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import nn

from lightning_modules.compilation import check_compile
from lightning_modules.loss import check_loss
from lightning_modules.models import LoadedModel
from qat.errors import InputError
from qat.nn import LowBitLinear

_FP8_CAPABILITY = (8, 9)


def check_numbers(cfg: DictConfig) -> None:
    """Refuse numbers that torch and Lightning would fail on without naming the option."""
    least = {"seed": 0, "threads": 1, "calibration_batches": 1, "trainer.accumulate_grad_batches": 1}
    least |= {"trainer.max_steps": -1, "data.sequence_length": 1}
    for key, lowest in least.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and (not isinstance(value, int) or value < lowest):
            raise InputError(f"{key} is {value}; it is a whole number from {lowest} on.")
    if cfg.fit and cfg.trainer.max_steps == -1 and cfg.trainer.max_epochs is None and "max_time" not in cfg.trainer:
        raise InputError("How long to train is unknown: set trainer.max_steps, or trainer.max_epochs beside -1.")
    if cfg.fit and cfg.trainer.max_steps == 0:
        raise InputError("trainer.max_steps is 0: to quantize without training, take method=ptq.")
    rate = OmegaConf.select(cfg, "optimizer.lr")
    if rate is not None and not (isinstance(rate, int | float) and rate > 0):
        raise InputError(f"optimizer.lr is {rate}; it is a positive number, such as 1e-4.")


def check_module(cfg: DictConfig) -> None:
    """Refuse a compiler's backend and a loss of `cfg.module` that there are none of, before a model is loaded.

    Raises:
        InputError: if there are none.
    """
    check_compile(cfg.module.get("compile"), cfg.module.get("cuda_graphs", False))
    check_loss(cfg.module.get("loss", "auto"))


def check_positions_and_tokens(loaded: LoadedModel, sequence_length: int) -> None:
    """Refuse windows and tokens that the model has no embedding for."""
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise InputError(f"The model knows {positions} positions: set data.sequence_length to at most {positions}.")
    highest = max(loaded.tokenizer.get_vocab().values())
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise InputError(f"The tokenizer has a token {highest}, the model only {rows} of them: they do not fit.")


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse what would not leave the trained model in this process, and sweeps of runs that start processes.

    Raises:
        InputError: if so.
    """
    strategy, launcher = trainer.strategy, trainer.strategy.launcher
    if trainer.world_size == 1:
        return
    if not isinstance(strategy, DDPStrategy) or not isinstance(launcher, _SubprocessScriptLauncher):
        raise InputError(
            f"A run of {trainer.world_size} devices is one of trainer.strategy=ddp, not of {type(strategy).__name__}. "
            "A model that one device does not hold is sharded in a training loop of one's own (docs/training.md)."
        )
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise InputError("A sweep (-m) has runs of one device: set trainer.devices=1, or start its runs one by one.")


def emulates_fp8(model: nn.Module, device: torch.device) -> bool:
    """Whether `model` has products of fp8 codes and `device` no instructions for them.

    Raises:
        InputError: if it is a GPU that has none.
    """
    if not any(isinstance(layer, LowBitLinear) and layer.compute == "fp8" for layer in model.modules()):
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise InputError(f"{name} has no fp8 instructions: set scheme=w8a8g8 (int8), or scheme.compute=fake.")
    return device.type == "cpu"
