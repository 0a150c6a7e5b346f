"""Every grid on the same model, tokens and steps: perplexity after rounding and after quantization-aware training.

    python -m benchmarks.grids --texts TEXTS         every grid, and results/grids.json; a run that stopped goes on

TEXTS is a folder with the training texts, *.train.txt, and the evaluation text, wiki106.val.txt; documents are
separated by lines of <|endoftext|>. The model is SmolLM2-135M off its grid (benchmarks/off_grid.py). Three figures for
each grid, all over 512-token windows of the evaluation text: `ppl_fp`, the model trained without quantization;
`ppl_rtn`, that model rounded; `ppl_qat`, the untrained model trained with the grid on the same tokens in their order.
All linear layers but the head are quantized, weights only. Adam, 8 x 512 tokens a step, bf16 autocast, cosine to a
tenth; one seed.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import qat
from benchmarks.off_grid import rotate_
from benchmarks.record import record
from benchmarks.texts import windows
from lightning_modules.causal_lm import parameter_groups
from lightning_modules.models import load_smollm2
from qat.atomic import replaced_file
from qat.export.artifact import bits_per_weight
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
    VectorQuantizer,
)

G64 = {"granularity": "per_group_64"}
BF16 = {"scale_dtype": "bfloat16"}
ABSMEAN = {"rule": "absmean"} | BF16
GRIDS = {
    "binary-g64": partial(TableQuantizer, family="binary", bits=1, **G64, **ABSMEAN),
    "kmeans1-row": partial(KMeansQuantizer, bits=1),
    "ternary": partial(TableQuantizer, family="ternary", bits=2, granularity="per_tensor", **ABSMEAN),
    "twn-row": partial(TableQuantizer, family="ternary", bits=2, granularity="per_channel", rule="twn", **BF16),
    "ternary-lsq-g64": partial(LSQQuantizer, bits=2, grid="ternary", **G64),
    "int2-g64": partial(LSQQuantizer, bits=2, **G64),
    "stretched2-g64": partial(LSQQuantizer, bits=2, grid="stretched", **G64),
    "nf2-g64": partial(TableQuantizer, bits=2, **G64, **BF16),
    "kmeans2-row": partial(KMeansQuantizer, bits=2),
    "vector2-row": partial(VectorQuantizer, bits=2),
    "int3-g64": partial(LSQQuantizer, bits=3, **G64),
    "stretched3-g64": partial(LSQQuantizer, bits=3, grid="stretched", **G64),
    "nf3-g64": partial(TableQuantizer, bits=3, **G64, **BF16),
    "apot3-g64": partial(TableQuantizer, family="apot", bits=3, **G64, **BF16),
    "kmeans3-row": partial(KMeansQuantizer, bits=3),
    "vector3-row": partial(VectorQuantizer, bits=3),
    "int4-minmax-g64": partial(MinMaxQuantizer, bits=4, **G64),
    "int4-g64": partial(LSQQuantizer, bits=4, **G64),
    "nf4-g64": partial(TableQuantizer, bits=4, **G64, **BF16),
    "af4-g64": partial(TableQuantizer, family="af", bits=4, **G64, **BF16),
    "fp4-g64": partial(MinMaxQuantizer, bits=4, format="fp4_e2m1", **G64),
    "mxfp4-g32": MicroscalingQuantizer,
    "nvfp4-g16": NVFP4Quantizer,
    "pot4-g64": partial(TableQuantizer, family="pot", bits=4, **G64, **BF16),
    "apot4-g64": partial(TableQuantizer, family="apot", bits=4, **G64, **BF16),
    "kmeans4-row": partial(KMeansQuantizer, bits=4),
    "kmeans4-nf4-g64": partial(KMeansQuantizer, bits=4, init="nf4", codebook="per_tensor", learn_scale=True, **G64),
    "vector4-row": partial(VectorQuantizer, bits=4),
    "fp6-g64": partial(MinMaxQuantizer, bits=6, format="fp6_e2m3", **G64),
    "mxfp6-g32": partial(MicroscalingQuantizer, format="fp6_e2m3"),
    "int8-row": partial(MinMaxQuantizer, bits=8),
    "fp8-row": partial(MinMaxQuantizer, bits=8, format="fp8_e4m3"),
    "fp8-e5m2-row": partial(MinMaxQuantizer, bits=8, format="fp8_e5m2"),
    "mxfp8-g32": partial(MicroscalingQuantizer, format="fp8_e4m3"),
}
BATCH, LENGTH = 8, 512
LR, QUANTIZER_LR, WARMUP = 2e-4, 1e-3, 15
FP = "fp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--work", type=Path, default=Path("outputs/grids"), help="where rows and the fp model are kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--arm", choices=[FP, *GRIDS], help="run one arm in this process")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.arm:
        run(options.arm, options)
        return
    for arms, jobs in (([FP], 1), (options.grids, options.jobs)):
        run_all([arm for arm in arms if not _row(options.work, arm).is_file()], jobs)
    done = [grid for grid in GRIDS if _row(options.work, grid).is_file()]
    rows = [json.loads(_row(options.work, arm).read_text()) for arm in (FP, *done)]
    record("grids", f"python -m benchmarks.grids --texts TEXTS --steps {options.steps} --jobs {options.jobs}", rows)


def run_all(arms: list[str], jobs: int) -> None:
    """One process for each arm, `jobs` at a time; stops with the first that fails."""
    waiting, running = list(arms), []
    for _ in track(arms, description=f"{len(arms)} arms"):
        while waiting and len(running) < jobs:
            running.append(
                subprocess.Popen([sys.executable, "-m", "benchmarks.grids", *sys.argv[1:], "--arm", waiting.pop(0)])
            )
        while all(process.poll() is None for process in running):
            time.sleep(0.2)
        ended = next(process for process in running if process.poll() is not None)
        running.remove(ended)
        if ended.returncode:
            for process in running:
                process.kill()
            raise SystemExit(f"{' '.join(ended.args)} failed")


def run(arm: str, options: argparse.Namespace) -> None:
    """Train one arm and write its row."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = windows(options.texts, LENGTH)
    val = val.to(device)
    row: dict[str, Any] = {"grid": arm, "model": "smollm2-rotated", "text": "wiki106.val"}
    row |= {"steps": options.steps, "tokens": options.steps * BATCH * LENGTH}
    if arm == FP:
        model = load(device)
        row |= {"bits_per_weight": 32.0, "ppl_base": perplexity(model, val)}
        fit(model, train, options.steps)
        row["ppl_fp"] = perplexity(model, val)
        with replaced_file(options.work / "fp.pt") as temporary:
            torch.save(model.state_dict(), temporary)
    else:
        row["ppl_fp"] = json.loads(_row(options.work, FP).read_text())["ppl_fp"]
        tuned = torch.load(options.work / "fp.pt", map_location=device, weights_only=True)
        rounded = qat.prepare(load(device, tuned), qat.Scheme(weight=GRIDS[arm]))
        row |= {"bits_per_weight": bits_per_weight(rounded), "ppl_rtn": perplexity(rounded, val)}
        del rounded, tuned
        trained = qat.prepare(load(device), qat.Scheme(weight=GRIDS[arm]))
        fit(trained, train, options.steps)
        row["ppl_qat"] = perplexity(trained, val)
    row["seconds"] = time.perf_counter() - start
    with replaced_file(_row(options.work, arm)) as temporary:
        temporary.write_text(json.dumps(row))
    print(row, flush=True)


def load(device: torch.device, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """SmolLM2 off its grid; or with other weights."""
    model = rotate_(load_smollm2("~/.cache/lightning-qat").model)
    if weights is not None:
        model.load_state_dict(weights)
    return model.to(device)


def fit(model: nn.Module, train: Tensor, steps: int) -> None:
    """Train on the same windows in the same order, whatever the arm."""
    torch.manual_seed(0)
    device = next(model.parameters()).device
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(parameter_groups(model, QUANTIZER_LR), LR, (0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    for step in range(steps):
        batch = train[order[(torch.arange(BATCH) + step * BATCH) % len(order)]].to(device, torch.int64)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


@torch.no_grad()
def perplexity(model: nn.Module, val: Tensor) -> float:
    """exp of the mean next-token loss over all windows, in the precision of training."""
    model.eval()
    losses = []
    for batch in val.split(16):
        with torch.autocast(val.device.type, torch.bfloat16):
            losses.append(model(input_ids=batch.long(), labels=batch.long(), use_cache=False).loss * len(batch))
    return math.exp(float(torch.stack(losses).sum()) / len(val))


def _row(work: Path, arm: str) -> Path:
    return work / f"{arm}.json"


if __name__ == "__main__":
    main()
