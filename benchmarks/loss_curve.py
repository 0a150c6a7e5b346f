"""Whether kernels train as their references do: the losses of the same steps, one after the other.

    python -m benchmarks.loss_curve --texts TEXTS          needs a GPU; writes results/loss_curve.json

Model, texts and training are those of benchmarks/grids.py. Every case is trained twice from the same weights, on the
same windows: with the Triton kernels, and with the PyTorch references. `largest` and `mean` are differences of the
losses of all steps; `noise` is the mean difference of the references to themselves with the windows in another order,
which says what a difference is worth. Codes and values are the same to the bit at the same weights; gradients of scales
and codebooks are sums in another order.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qat
from benchmarks.recipe import LENGTH, MODEL, device, load, losses
from benchmarks.record import record
from benchmarks.texts import windows
from qat.kernels.ops import reference_kernels
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer

TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
SCHEMES = {
    "w4a8-lsq": qat.Scheme(weight=partial(LSQQuantizer, bits=4, granularity="per_group_64"), input=TOKEN8),
    "w4a8-minmax": qat.Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_group_32"), input=TOKEN8),
    "kmeans4-row": qat.Scheme(weight=partial(KMeansQuantizer, bits=4)),
}
RATE = 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    if device().type != "cuda":
        raise SystemExit("This needs a CUDA GPU: elsewhere the references are what computes.")
    train, _ = windows(options.texts, LENGTH)
    rows = [compare(name, train, options.steps) for name in SCHEMES]
    record("loss_curve", f"python -m benchmarks.loss_curve --texts TEXTS --steps {options.steps}", rows, ("triton",))


def compare(name: str, train: Tensor, steps: int) -> dict[str, Any]:
    """One row."""
    found = curve(name, train, steps)
    with reference_kernels():
        expected, other = (curve(name, train, steps, seed) for seed in (0, 1))
    difference = (found - expected).abs()
    row = {"scheme": name, "model": MODEL, "steps": steps, "first": float(found[0]), "last": float(found[-20:].mean())}
    row |= {"largest": float(difference.max()), "mean": float(difference.mean())}
    row |= {"noise": float((other - expected).abs().mean())}
    print(row, flush=True)
    return row


def curve(name: str, train: Tensor, steps: int, seed: int = 0) -> Tensor:
    """The loss of every step."""
    torch.manual_seed(0)
    return losses(qat.prepare(load(), SCHEMES[name]), RATE, train, steps, seed)


if __name__ == "__main__":
    main()
