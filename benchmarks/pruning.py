"""Size, speed and perplexity of pruned models, in full precision and in 4 bits.

    python -m benchmarks.pruning --texts TEXTS       every arm, and results/pruning.json; a run that stopped goes on

SmolLM2 off its grid, without training. Calibration is on the first windows of the training texts, perplexity on
wiki106.val; TEXTS is the folder of benchmarks/grids.py. `mib` is the folder that is saved, full-precision embedding and
head included; `seconds_per_token` is a forward pass of the saved model over windows of 512 tokens, and no kernel here
skips zeros, so it only tells of parts that are gone and of codes that are unpacked.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import qat
from benchmarks.recipe import LENGTH, MODEL, device, load, perplexity
from benchmarks.record import record
from benchmarks.texts import windows
from qat.atomic import replaced_file
from qat.export.artifact import bits_per_weight, density
from qat.quantizers import LSQQuantizer
from qat.transforms import gptq, magnitude, sparsegpt, structured, wanda

INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_64")
FP, SCHEMES = "fp", ("fp", "int4-g64")
METHODS: dict[str, Callable[..., nn.Module]] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
STRUCTURED = {
    "structured-width": {"heads": 0.3, "channels": 0.3},
    "structured-width-plain": {"heads": 0.3, "channels": 0.3, "compensate": False},
    "structured-depth": {"blocks": 0.3},
}
PATTERNS = ("unstructured", "2:4")
# Name, pattern, scheme. GPTQ after Wanda is the same two steps as SparseGPT, one after the other.
ARMS = [
    *(("dense", "dense", scheme) for scheme in SCHEMES),
    ("gptq", "dense", "int4-g64"),
    *((method, pattern, scheme) for method in METHODS for pattern in PATTERNS for scheme in SCHEMES),
    *(("wanda-gptq", pattern, "int4-g64") for pattern in PATTERNS),
    *((name, "parts", scheme) for name in STRUCTURED for scheme in SCHEMES),
]
Arm = tuple[str, str, str]
Batches = list[dict[str, Tensor]]
_BATCH, _REPEATS = 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--work", type=Path, default=Path("outputs/pruning"), help="where rows are kept")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--arms", nargs="+", choices=sorted({name for name, *_ in ARMS}), help="all")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    train, val = windows(options.texts, LENGTH)
    batches = calibration(train, options.calibration)
    # The dense model comes first: the others' rows hold its perplexity.
    arms = [arm for arm in ARMS if options.arms is None or arm[0] in ("dense", *options.arms)]
    for arm in arms:
        path = _row(options.work, arm)
        if not path.is_file():
            row = run(arm, batches, val)
            dense = row if arm == ARMS[0] else json.loads(_row(options.work, ARMS[0]).read_text())
            with replaced_file(path) as temporary:
                temporary.write_text(json.dumps(row | {"ppl_fp": dense["ppl"], "calibration": options.calibration}))
            print(row, flush=True)
    rows = [json.loads(_row(options.work, arm).read_text()) for arm in arms]
    record("pruning", f"python -m benchmarks.pruning --texts TEXTS --calibration {options.calibration}", rows)


def calibration(train: Tensor, count: int) -> Batches:
    """The first `count` windows, in small batches."""
    parts = train[:count].to(device(), torch.int64).split(_BATCH)
    return [{"input_ids": part, "labels": part} for part in parts]


def run(arm: Arm, batches: Batches, val: Tensor) -> dict[str, Any]:
    """Prune and quantize one arm, and measure what is saved."""
    name, pattern, scheme = arm
    start = time.perf_counter()
    model = pruned(arm, batches)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"arm": name, "pattern": pattern, "scheme": scheme, "model": MODEL, "text": "wiki106.val"}
    row |= {"sparsity": removed(model), "seconds_to_prune": seconds, "ppl": perplexity(model, val)}
    row |= {"bits_per_weight": 32.0 if scheme == FP else bits_per_weight(model)}
    row |= {"density": None if scheme == FP else density(model)}
    if any(hasattr(module, "weight_quantizer") for module in model.modules()):
        qat.convert(model)
    return row | {"mib": saved_mib(model, scheme), "seconds_per_token": seconds_per_token(model, val)}


def pruned(arm: Arm, batches: Batches) -> nn.Module:
    """The model of one arm."""
    name, pattern, scheme = arm
    model = load()
    if name in STRUCTURED:
        structured(model, batches, **STRUCTURED[name])
    if scheme != FP:
        qat.prepare(model, qat.Scheme(weight=INT4))
    method = METHODS.get(name.removesuffix("-gptq"))
    if method is not None:
        method(model, batches, pattern=pattern)
    return gptq(model, batches) if name.endswith("gptq") else model


def removed(model: nn.Module) -> float:
    """The share of the weights of the dense model's blocks that are gone: pruned, or parts of what was removed."""
    left = sum(int(_kept(module)) for module in _linear_layers(model))
    return 1 - left / sum(module.weight.numel() for module in _linear_layers(load()))


def _kept(module: Any) -> int:
    mask = getattr(getattr(module, "weight_quantizer", None), "mask", None)
    return module.weight.numel() if mask is None else int(mask.sum())


def _linear_layers(model: Any) -> list[nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def saved_mib(model: Any, scheme: str) -> float:
    """What the saved model takes on disk."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if scheme == FP:
            model.save_pretrained(folder)
        else:
            qat.save(model, folder)
        return sum(file.stat().st_size for file in folder.iterdir()) / 2**20


@torch.no_grad()
def seconds_per_token(model: nn.Module, val: Tensor) -> float:
    """Of a forward pass over a batch of windows, in bf16 autocast: the median of several."""
    ids, times = val[:_BATCH].to(device(), torch.int64), []
    model.eval()
    for _ in range(_REPEATS + 1):
        _wait()
        start = time.perf_counter()
        with torch.autocast(ids.device.type, torch.bfloat16):
            model(input_ids=ids, use_cache=False)
        _wait()
        times.append(time.perf_counter() - start)
    return median(times[1:]) / ids.numel()


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def _row(work: Path, arm: Arm) -> Path:
    return work / f"{'@'.join(arm).replace(':', 'of')}.json"


if __name__ == "__main__":
    main()
