"""The command that finds the fastest launches of kernels on the GPU at hand: `qat-tune artifact=outputs/RUN/native`."""

from collections.abc import Callable

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from lightning_modules.cli import command
from qat import load
from qat.errors import InputError
from qat.kernels.quantized_linear.choice import rule
from qat.kernels.quantized_linear.launches import Key, key_of
from qat.kernels.quantized_linear.tuned import path_for, save, tuned_on
from qat.kernels.quantized_linear.tuning import candidates, fastest_first
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
    left = {key: [count for count in tokens if cfg.again or not _is_known(gpu, key, count)] for key in weights}
    tries = sum(len(list(candidates(weights[key], count))) for key, counts in left.items() for count in counts)
    with Progress(*Progress.get_default_columns(), console=console) as progress:
        task = progress.add_task("tuning", total=tries)
        for key, counts in left.items():
            if counts:
                progress.print(_tuned(gpu, key, weights[key], counts, lambda: progress.advance(task)))
    console.print(f"{'Nothing was left to tune.' if not tries else 'Done.'} Launches are in {path_for(gpu)}")


def kinds_of_weights(model: nn.Module) -> dict[Key, TiledWeight]:
    """One weight of each kind that kernels multiply."""
    found: dict[Key, TiledWeight] = {}
    for module in model.modules():
        weight = module.weight.tiled() if isinstance(module, PackedLinear) else None
        if weight is not None:
            found.setdefault(key_of(weight), weight)
    return found


def _tokens(given: object) -> list[int]:
    tokens = list(given) if isinstance(given, list | ListConfig) else [given]
    if not tokens or not all(isinstance(count, int) and count > 0 for count in tokens):
        raise InputError(f"tokens are {given}: give numbers of tokens that are multiplied at a time, tokens=[1,16,64].")
    return sorted(set(tokens))


def _is_known(gpu: str, key: Key, tokens: int) -> bool:
    return tokens in dict(tuned_on(gpu).get(key, ()))


def _tuned(
    gpu: str, key: Key, weight: TiledWeight, tokens: list[int], tried: Callable[[], None] = lambda: None
) -> Table:
    """Find launches for `weight`, keep each, and show them beside the rule's."""
    table = Table(title=" x ".join(map(str, key[:2])) + f", {key.bits} bits, {key.kind}, groups of {key.group}")
    for heading in ("tokens", "launch", "µs", "the rule's, µs"):
        table.add_column(heading, justify="left" if heading == "launch" else "right")
    for count in tokens:
        times = fastest_first(weight, count, tried=tried)
        how, us = times[0]
        save(gpu, key, ((count, how),))
        ruled = dict(times).get(rule(weight.layout, count))
        table.add_row(str(count), str(how), f"{us:.1f}", "" if ruled is None else f"{ruled:.1f}")
    return table


if __name__ == "__main__":
    main()
