"""The command that finds the fastest launches of kernels on the GPU at hand: `qat-tune artifact=outputs/RUN/native`."""

from collections.abc import Iterable

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from lightning_modules.cli import command
from qat import load
from qat.errors import InputError
from qat.kernels.quantized_linear.choice import rule
from qat.kernels.quantized_linear.launches import Key, key_of
from qat.kernels.quantized_linear.tuned import path_for, save, tuned_on
from qat.kernels.quantized_linear.tuning import fastest_first
from qat.kernels.quantized_linear.weight import TiledWeight
from qat.nn import PackedLinear


def main() -> None:
    """Entry point of `qat-tune`."""
    command("tune", _run)


def _run(cfg: DictConfig) -> None:
    tokens = _tokens(cfg.tokens)
    if not torch.cuda.is_available():
        raise InputError("qat-tune needs a CUDA GPU: on a CPU there are no launches to choose among.")
    gpu, console = torch.cuda.get_device_name(), Console()
    model = load(cfg.artifact, trust_remote_code=cfg.trust_remote_code).to("cuda", torch.bfloat16)
    weights = kinds_of_weights(model)
    if not weights:
        raise InputError(f"{cfg.artifact} has no layer whose codes a kernel multiplies.")
    left = {key: weight for key, weight in weights.items() if cfg.again or not _is_known(gpu, key, tokens)}
    for key, weight in track(left.items(), description="tuning", console=console):
        console.print(_tuned(gpu, key, weight, tokens))
    console.print(f"{len(weights) - len(left)} of {len(weights)} were known. Kept in {path_for(gpu)}")


def kinds_of_weights(model: nn.Module) -> dict[Key, TiledWeight]:
    """One weight of each kind that kernels multiply."""
    found: dict[Key, TiledWeight] = {}
    for module in model.modules():
        weight = module.weight.tiled() if isinstance(module, PackedLinear) else None
        if weight is not None:
            found.setdefault(key_of(weight.layout), weight)
    return found


def _tokens(given: object) -> list[int]:
    tokens = list(given) if isinstance(given, list | ListConfig) else [given]
    if not tokens or not all(isinstance(count, int) and count > 0 for count in tokens):
        raise InputError(f"tokens are {given}: give numbers of tokens that are multiplied at a time, tokens=[1,16,64].")
    return sorted(set(tokens))


def _is_known(gpu: str, key: Key, tokens: Iterable[int]) -> bool:
    return set(tokens) <= {most for most, _ in tuned_on(gpu).get(key, ())}


def _tuned(gpu: str, key: Key, weight: TiledWeight, tokens: list[int]) -> Table:
    """Find launches for `weight`, keep them, and show them beside the rule's."""
    table = Table(title=" x ".join(map(str, key[:2])) + f", {key.bits} bits, {key.kind}, groups of {key.group}")
    for heading in ("tokens", "launch", "µs", "the rule's, µs"):
        table.add_column(heading, justify="left" if heading == "launch" else "right")
    launches = []
    for count in tokens:
        times = fastest_first(weight, count)
        how, us = times[0]
        launches.append((count, how))
        ruled = dict(times).get(rule(weight.layout, count))
        table.add_row(str(count), str(how), f"{us:.1f}", "" if ruled is None else f"{ruled:.1f}")
    save(gpu, key, tuple(launches))
    return table


if __name__ == "__main__":
    main()
