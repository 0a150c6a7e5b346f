"""Every grid on the same model, tokens and steps: perplexity after rounding and after quantization-aware training.

    python -m benchmarks.grids --texts TEXTS         every grid, and results/grids.json; a run that stopped goes on

TEXTS is a folder with the training texts, *.train.txt, and the evaluation text, wiki106.val.txt; documents are
separated by lines of <|endoftext|>. Training is that of benchmarks/recipe.py. Three figures for each grid: `ppl_fp`,
the model trained without quantization; `ppl_rtn`, that model rounded; `ppl_qat`, the untrained model trained with the
grid on the same tokens in their order. All linear layers but the head are quantized, weights only.

Grids of equal bits share a learning rate. The full-precision model and the integers of 2, 3 and 4 bits are trained at
every rate; the best of the former is the one that is rounded.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from benchmarks.recipe import BATCH, LENGTH, MODEL, fit, load, perplexity
from benchmarks.record import record
from benchmarks.texts import windows
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
    "kmeans3-row-i7": partial(KMeansQuantizer, bits=3, entry_bits=7),
    "vector3-row": partial(VectorQuantizer, bits=3),
    "int4-minmax-g64": partial(MinMaxQuantizer, bits=4, **G64),
    "int4-g64": partial(LSQQuantizer, bits=4, **G64),
    "int4-g32": partial(LSQQuantizer, bits=4, granularity="per_group_32"),
    "nf4-g32": partial(TableQuantizer, bits=4, granularity="per_group_32", **BF16),
    "nf4-g64": partial(TableQuantizer, bits=4, **G64, **BF16),
    "af4-g64": partial(TableQuantizer, family="af", bits=4, **G64, **BF16),
    "fp4-g64": partial(MinMaxQuantizer, bits=4, format="fp4_e2m1", **G64),
    "mxfp4-g32": MicroscalingQuantizer,
    "nvfp4-g16": NVFP4Quantizer,
    "pot4-g64": partial(TableQuantizer, family="pot", bits=4, **G64, **BF16),
    "apot4-g64": partial(TableQuantizer, family="apot", bits=4, **G64, **BF16),
    "kmeans4-row": partial(KMeansQuantizer, bits=4),
    "kmeans4-row-i7": partial(KMeansQuantizer, bits=4, entry_bits=7),
    "kmeans4-g64": partial(KMeansQuantizer, bits=4, codebook="per_tensor", learn_scale=True, **G64),
    "kmeans4-row-g64": partial(KMeansQuantizer, bits=4, codebook="per_channel", learn_scale=True, **G64),
    "kmeans4-nf4-g64": partial(KMeansQuantizer, bits=4, init="nf4", codebook="per_tensor", learn_scale=True, **G64),
    "vector4-row": partial(VectorQuantizer, bits=4),
    "fp6-g64": partial(MinMaxQuantizer, bits=6, format="fp6_e2m3", **G64),
    "mxfp6-g32": partial(MicroscalingQuantizer, format="fp6_e2m3"),
    "int8-row": partial(MinMaxQuantizer, bits=8),
    "fp8-row": partial(MinMaxQuantizer, bits=8, format="fp8_e4m3"),
    "fp8-e5m2-row": partial(MinMaxQuantizer, bits=8, format="fp8_e5m2"),
    "mxfp8-g32": partial(MicroscalingQuantizer, format="fp8_e4m3"),
}
FP = "fp"
RATES = (2e-5, 5e-5, 1e-4)
AT_EVERY_RATE = (FP, "int2-g64", "int3-g64", "int4-g64")
Arm = tuple[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--work", type=Path, default=Path("outputs/grids"), help="where rows and the fp model are kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    texts = windows(options.texts, LENGTH)
    fp = [(FP, rate) for rate in RATES]
    grids = [arm for grid in options.grids for arm in arms_of(grid)]
    for arm in fp + grids:
        if not _row(options.work, arm).is_file():
            run(arm, texts, options)
    rows = [json.loads(_row(options.work, arm).read_text()) for arm in fp + grids]
    record("grids", f"python -m benchmarks.grids --texts TEXTS --steps {options.steps}", rows)


def arms_of(grid: str) -> list[Arm]:
    """The learning rates that `grid` is trained with; fewer bits want larger ones."""
    if grid in AT_EVERY_RATE:
        return [(grid, rate) for rate in RATES]
    format = GRIDS[grid](shape=(64, 64)).format
    bits = format.bits // format.block
    return [(grid, RATES[2] if bits <= 2 else RATES[1] if bits == 3 else RATES[0])]


def run(arm: Arm, texts: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
    """Train one arm and write its row."""
    grid, rate = arm
    train, val = texts
    model = fit(quantized(load(), grid), rate, train, options.steps)
    row: dict[str, Any] = {"grid": grid, "model": MODEL, "text": "wiki106.val", "learning_rate": rate}
    row |= {"steps": options.steps, "tokens": options.steps * BATCH * LENGTH}
    if grid == FP:
        row |= {"bits_per_weight": 32.0, "ppl_untrained": perplexity(load(), val), "ppl_fp": perplexity(model, val)}
        with replaced_file(_weights(options.work, rate)) as temporary:
            torch.save(model.state_dict(), temporary)
    else:
        ppl_fp, best = min((json.loads(_row(options.work, (FP, each)).read_text())["ppl_fp"], each) for each in RATES)
        tuned = torch.load(_weights(options.work, best), map_location="cpu", weights_only=True)
        rounded = quantized(load(tuned), grid)
        row |= {"bits_per_weight": bits_per_weight(rounded), "ppl_fp": ppl_fp}
        row |= {"ppl_rtn": perplexity(rounded, val), "ppl_qat": perplexity(model, val)}
    with replaced_file(_row(options.work, arm)) as temporary:
        temporary.write_text(json.dumps(row))
    print(row, flush=True)


def quantized(model: nn.Module, grid: str) -> nn.Module:
    """`model` with the weights of its linear layers on `grid`."""
    return model if grid == FP else qat.prepare(model, qat.Scheme(weight=GRIDS[grid]))


def _row(work: Path, arm: Arm) -> Path:
    grid, rate = arm
    return work / f"{grid}@{rate:g}.json"


def _weights(work: Path, rate: float) -> Path:
    return work / f"{FP}@{rate:g}.pt"


if __name__ == "__main__":
    main()
