"""What fake quantization adds to a training step of SmolLM2-135M on a CPU: seconds and peak memory.

    python -m benchmarks.cpu_step                    every arm, alternating, and results/cpu_step.json

Each measurement is a process of its own, because peak memory is one figure a process; the arms take turns, so that a
slow minute of the machine hits all of them. A step is forward, backward, gradient clipping and AdamW, at 1 x 256
tokens in float32, once eager and once with blocks compiled as `module.compile=inductor` does it. Before any timing each
arm's gradients are compared with those of the unfused definition.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

import qat
from benchmarks.record import record
from lightning_modules.allocator import keep_freed_memory
from lightning_modules.compilation import CompiledBlocks
from lightning_modules.models import load_smollm2
from qat.numerics.functional import fake_quantize
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms import quant_layers

GROUPS = {"granularity": "per_group_64"}
ARMS = {
    "fp": None,
    "ours-int3-g64-lsq": partial(LSQQuantizer, bits=3, **GROUPS),
    "ours-int4-g64-minmax": partial(MinMaxQuantizer, bits=4, **GROUPS),
    "ours-kmeans3-row": partial(KMeansQuantizer, bits=3),
    "ours-kmeans4-row": partial(KMeansQuantizer, bits=4),
    "torchao-int4-g64": "torchao",
}
BACKENDS = ("eager", "inductor")
TOKENS = 256
Turn = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes for each arm")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a process")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "BACKEND"), help="measure in this process, print as JSON")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which arms to compare")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps)))
        return
    found: dict[Turn, list[dict[str, float]]] = {(a, b): [] for b in options.backends for a in options.arms}
    for turn in track(list(found) * options.rounds, description="measuring"):
        command = [sys.executable, "-m", "benchmarks.cpu_step", "--one", *turn, "--steps", str(options.steps)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[turn].append(json.loads(output.splitlines()[-1]))
    rows = [row for backend in options.backends for row in summary(found, backend)]
    for row in rows:
        time_and_memory = f"{row['seconds']:.2f} s {row['added_time']:+.0%}  {row['peak_gib']:.2f} GiB"
        print(f"{row['arm']:24} {row['backend']:9} {time_and_memory} {row['added_memory']:+.0%}")
    if (options.arms, options.backends) == (list(ARMS), list(BACKENDS)):
        command = f"python -m benchmarks.cpu_step --rounds {options.rounds} --steps {options.steps}"
        record("cpu_step", command, rows, ("torchao",))


def summary(found: dict[Turn, list[dict[str, float]]], backend: str) -> list[dict[str, float | str]]:
    """One row for each arm: medians over its processes; time relative to the fp process of the same turn."""
    reference = found["fp", backend]
    rows: list[dict[str, float | str]] = []
    for arm, runs in ((arm, runs) for (arm, own), runs in found.items() if own == backend):
        slower = statistics.median(run["seconds"] / fp["seconds"] for run, fp in zip(runs, reference, strict=True))
        larger = statistics.median(run["peak_gib"] / fp["peak_gib"] for run, fp in zip(runs, reference, strict=True))
        rows.append(
            {
                "arm": arm,
                "model": "smollm2",
                "backend": backend,
                "seconds": statistics.median(run["seconds"] for run in runs),
                "peak_gib": statistics.median(run["peak_gib"] for run in runs),
                "speed_ratio": 1 / slower,
                "memory_ratio": larger,
                "added_time": slower - 1,
                "added_memory": larger - 1,
            }
        )
    return rows


def measure(arm: str, backend: str, steps: int) -> dict[str, float]:
    """Median seconds of a step and peak resident memory, in this process; every arm with train.py's allocator."""
    keep_freed_memory()
    model = load_smollm2("~/.cache/lightning-qat").model.train()
    _quantize(model, arm)
    step_of = nullcontext if backend == "eager" else compiled(model, arm)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    ids = torch.randint(0, 49152, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = []
    for step in range(steps + 2):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading and warming up
        start = time.perf_counter()
        with step_of():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": statistics.median(seconds[2:]), "peak_gib": peak_kib / 2**20}


def compiled(model: nn.Module, arm: str) -> Callable[[], AbstractContextManager[None]]:
    """What a forward pass goes through; blocks whose layers are not ours are compiled by torch's defaults."""
    if ARMS[arm] != "torchao":
        return CompiledBlocks(model, "inductor").step
    for block in model.model.layers:
        block.compile()
    return nullcontext


def _quantize(model: nn.Module, arm: str) -> None:
    factory = ARMS[arm]
    if factory == "torchao":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        config = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=64), step="prepare")
        quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
    elif factory is not None:
        qat.prepare(model, qat.Scheme(weight=factory))
        _check(next(layer for _, layer in quant_layers(model)))


def _check(layer: qat.nn.QuantLinear) -> None:
    """The layer's gradients are those of the definition."""
    x, g = torch.randn(8, layer.in_features), torch.randn(8, layer.out_features)
    quantizer, weight = layer.weight_quantizer, layer.weight
    leaves = [weight, *(p for p in quantizer.parameters() if p.requires_grad)]
    plain = fake_quantize(weight, quantizer.qparams(weight), quantizer.format, quantizer.granularity)
    expected = torch.autograd.grad(nn.functional.linear(x, plain), leaves, g)
    for a, b in zip(torch.autograd.grad(layer(x), leaves, g), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


if __name__ == "__main__":
    main()
