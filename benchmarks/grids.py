"""Every grid on the same model, tokens and steps: perplexity after rounding and after quantization-aware training.

    python -m benchmarks.grids --texts TEXTS         every grid, and results/grids.json; a run that stopped goes on

TEXTS is a folder with the training texts, *.train.txt, and the evaluation text, wiki106.val.txt; documents are
separated by lines of <|endoftext|>. Training is that of benchmarks/recipe.py. Three figures for each grid: `ppl_fp`,
the model trained without quantization; `ppl_rtn`, that model rounded; `ppl_qat`, the untrained model trained with the
grid on the same tokens in their order. All linear layers but the head are quantized, weights only.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qat
from benchmarks.recipe import BATCH, LENGTH, MODEL, fit, load, perplexity, run_all
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
        run_all("benchmarks.grids", [arm for arm in arms if not _row(options.work, arm).is_file()], jobs)
    done = [grid for grid in GRIDS if _row(options.work, grid).is_file()]
    rows = [json.loads(_row(options.work, arm).read_text()) for arm in (FP, *done)]
    record("grids", f"python -m benchmarks.grids --texts TEXTS --steps {options.steps} --jobs {options.jobs}", rows)


def run(arm: str, options: argparse.Namespace) -> None:
    """Train one arm and write its row."""
    start = time.perf_counter()
    train, val = windows(options.texts, LENGTH)
    row: dict[str, Any] = {"grid": arm, "model": MODEL, "text": "wiki106.val"}
    row |= {"steps": options.steps, "tokens": options.steps * BATCH * LENGTH}
    if arm == FP:
        model = load()
        row |= {"bits_per_weight": 32.0, "ppl_base": perplexity(model, val)}
        row["ppl_fp"] = perplexity(fit(model, train, options.steps), val)
        with replaced_file(options.work / "fp.pt") as temporary:
            torch.save(model.state_dict(), temporary)
    else:
        scheme = qat.Scheme(weight=GRIDS[arm])
        row["ppl_fp"] = json.loads(_row(options.work, FP).read_text())["ppl_fp"]
        tuned = torch.load(options.work / "fp.pt", map_location="cpu", weights_only=True)
        rounded = qat.prepare(load(tuned), scheme)
        row |= {"bits_per_weight": bits_per_weight(rounded), "ppl_rtn": perplexity(rounded, val)}
        del rounded, tuned
        row["ppl_qat"] = perplexity(fit(qat.prepare(load(), scheme), train, options.steps), val)
    row["seconds"] = time.perf_counter() - start
    with replaced_file(_row(options.work, arm)) as temporary:
        temporary.write_text(json.dumps(row))
    print(row, flush=True)


def _row(work: Path, arm: str) -> Path:
    return work / f"{arm}.json"


if __name__ == "__main__":
    main()
