"""Whether kernels train as their references do: the losses of the same steps, one after the other.

    python -m benchmarks.loss_curve --texts TEXTS               needs a GPU; writes results/loss_curve.json
    python -m benchmarks.loss_curve --texts TEXTS --products    writes results/loss_products.json

Model, texts and training are those of benchmarks/grids.py. Every case is trained from the same weights on the same
windows, with the Triton kernels and with the PyTorch references; in float32 and under bf16 autocast. `largest` and
`mean` are differences of the losses of all steps, where whatever else PyTorch computes sums in a fixed order. Values
and their gradients are the same to the bit at the same weights, gradients of scales and codebooks are sums in another
order. So a scheme without any must train to the same bit; what others may differ by is known from `again`, the mean
difference of the references to themselves when PyTorch sums in any order, as it does by default. Rows that `--work`
holds are kept.

With `--products` layers that multiply codes, int8 or fp8, in the forward pass or in all three products, are compared
with fake quantization of the same weights and inputs; `noise` is how far fake quantization is from itself with the
windows in another order.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import qat
from benchmarks.recipe import LENGTH, MODEL, device, load, losses
from benchmarks.record import commit, kept, record
from benchmarks.texts import windows
from benchmarks.train_step import FP8, INT8, TOKEN8
from benchmarks.train_step import SCHEMES as CODES
from qat.kernels.ops import reference_kernels
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer

SCHEMES = {
    "w4a8-lsq": qat.Scheme(weight=partial(LSQQuantizer, bits=4, granularity="per_group_64"), input=TOKEN8),
    "w4a8-minmax": qat.Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_group_32"), input=TOKEN8),
    "kmeans4-row": qat.Scheme(weight=partial(KMeansQuantizer, bits=4)),
}
# What multiplies codes, by what it computes: fake quantization of the same weights and inputs.
PRODUCTS = {
    "w8a8 int8": (qat.Scheme(**INT8), {"forward": CODES["ours-w8a8-int8"], "all three": CODES["ours-w8a8g8-int8"]}),
    "w8a8 fp8": (qat.Scheme(**FP8), {"forward": CODES["ours-w8a8-fp8"], "all three": CODES["ours-w8a8g8-fp8"]}),
}
RATE = 2e-5
DTYPES = torch.float32, torch.bfloat16
LEARNED = ("w4a8-lsq", "kmeans4-row")  # schemes with gradients of scales or codebooks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--products", action="store_true", help="products of codes against fake quantization")
    parser.add_argument("--steps", type=int, help="default: 200, of products 1000")
    parser.add_argument("--work", type=Path, default=Path("outputs/loss_curve"), help="where rows are kept")
    options = parser.parse_args()
    if not options.products and device().type != "cuda":
        raise SystemExit("This needs a CUDA GPU: elsewhere the references are what computes.")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what fixed_order asks for; read with the first product
    train, _ = windows(options.texts, LENGTH)
    command = "python -m benchmarks.loss_curve --texts TEXTS"
    if options.products:
        steps = options.steps or 1000
        rows = []
        for name in PRODUCTS:
            rows += kept(_path(options.work, name, steps), partial(compare_products, name, train, steps))
            print(*rows[-2:], sep="\n", flush=True)
        record("loss_products", f"{command} --products --steps {steps}", rows, ("triton",))
    else:
        steps = options.steps or 200
        rows = []
        for dtype, name in itertools.product(DTYPES, SCHEMES):
            path = _path(options.work, f"{name}-{_spelled(dtype)}", steps)
            rows.append(kept(path, partial(compare, name, dtype, train, steps)))
        record("loss_curve", f"{command} --steps {steps}", rows, ("triton",))


def _path(work: Path, name: str, steps: int) -> Path:
    return work / f"{name}-{steps}-{commit()}.json"


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(name: str, dtype: torch.dtype, train: Tensor, steps: int) -> dict[str, Any]:
    """One row: kernels and references.

    Raises:
        SystemExit: if kernels train as no reference does.
    """
    train_own = partial(curve, SCHEMES[name], train, steps, dtype=dtype)
    with fixed_order():
        found = train_own()
        with reference_kernels():
            expected = train_own()
    again = expected
    if name in LEARNED:
        with reference_kernels():
            again = train_own()
    row = row_of(name, found, expected)
    row |= {"dtype": _spelled(dtype), "again": float((again - expected).abs().mean())}
    print(row, flush=True)
    if row["mean"] > 2 * row["again"]:
        raise SystemExit(
            f"Losses of {name} differ by {row['mean']:.2g} from the reference's, by {2 * row['again']:.2g} at most."
        )
    return row


@contextmanager
def fixed_order() -> Iterator[None]:
    """Let PyTorch sum in the same order whenever it does the same."""
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others add gradients up in any order
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def compare_products(name: str, train: Tensor, steps: int) -> list[dict[str, Any]]:
    """A row for the product of the forward pass, and one for all three."""
    fake, multiplied = PRODUCTS[name]
    expected, other = (curve(fake, train, steps, seed) for seed in (0, 1))
    noise = {"noise": float((other - expected).abs().mean())}
    return [
        row_of(f"{name}, {products}", curve(scheme, train, steps), expected) | noise
        for products, scheme in multiplied.items()
    ]


def row_of(name: str, found: Tensor, expected: Tensor) -> dict[str, Any]:
    """How far the losses `found` are from those `expected`."""
    difference = (found - expected).abs()
    row = {"scheme": name, "model": MODEL, "steps": len(found)}
    row |= {"first": float(found[0]), "last": float(found[-20:].mean()), "last_expected": float(expected[-20:].mean())}
    return row | {"largest": float(difference.max()), "mean": float(difference.mean())}


def curve(scheme: qat.Scheme, train: Tensor, steps: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The loss of every step."""
    torch.manual_seed(0)
    return losses(qat.prepare(load(), scheme), RATE, train, steps, seed, dtype)


if __name__ == "__main__":
    main()
