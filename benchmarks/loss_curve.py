"""Whether kernels train as their references do: the losses of the same steps, one after the other.

    python -m benchmarks.loss_curve --texts TEXTS               needs a GPU; writes results/loss_curve.json
    python -m benchmarks.loss_curve --texts TEXTS --products    writes results/loss_products.json

Model, texts and training are those of benchmarks/grids.py. Every case is trained from the same weights on the same
windows, with the Triton kernels and with the PyTorch references; in float32 and under bf16 autocast. `largest` and
`mean` are differences of the losses of all steps, where whatever else PyTorch computes sums in a fixed order. Values
and their gradients are the same to the bit at the same weights, gradients of scales and codebooks are sums in another
order. So a scheme without any must train to the same bit; what others may differ by is known from `again`, the mean
difference of the references to themselves when PyTorch sums in any order, as it does by default. `noise` is that with
the windows in another order.

With `--products` layers that multiply codes, int8 or fp8, in the forward pass or in all three products, are compared
with fake quantization of the same weights and inputs; `noise` is that of fake quantization.
"""

import argparse
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
from benchmarks.record import record
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
            rows += compare_products(name, train, steps)
            print(*rows[-2:], sep="\n", flush=True)
        record("loss_products", f"{command} --products --steps {steps}", rows, ("triton",))
    else:
        steps = options.steps or 200
        rows = [compare(name, dtype, train, steps) for dtype in DTYPES for name in SCHEMES]
        record("loss_curve", f"{command} --steps {steps}", rows, ("triton",))


def compare(name: str, dtype: torch.dtype, train: Tensor, steps: int) -> dict[str, Any]:
    """One row: kernels and references.

    Raises:
        SystemExit: if kernels train as no reference does.
    """
    with fixed_order():
        found = curve(SCHEMES[name], train, steps, dtype=dtype)
        with reference_kernels():
            expected, other = (curve(SCHEMES[name], train, steps, seed, dtype) for seed in (0, 1))
    with reference_kernels():
        again = curve(SCHEMES[name], train, steps, dtype=dtype)
    row = row_of(name, found, expected, other)
    row |= {"dtype": str(dtype).removeprefix("torch."), "again": float((again - expected).abs().mean())}
    print(row, flush=True)
    allowed = 2 * row["again"] if name in LEARNED else 0
    if row["mean"] > allowed:
        raise SystemExit(
            f"Losses of {name} differ by {row['mean']:.2g} from the reference's, by {allowed:.2g} at most."
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
    return [
        row_of(f"{name}, {products}", curve(scheme, train, steps), expected, other)
        for products, scheme in multiplied.items()
    ]


def row_of(name: str, found: Tensor, expected: Tensor, other: Tensor) -> dict[str, Any]:
    """How far the losses `found` are from those `expected`, and how far these are from `other`."""
    difference = (found - expected).abs()
    row = {
        "scheme": name,
        "model": MODEL,
        "steps": len(found),
        "first": float(found[0]),
        "last": float(found[-20:].mean()),
    }
    row |= {"last_expected": float(expected[-20:].mean())}
    row |= {"largest": float(difference.max()), "mean": float(difference.mean())}
    return row | {"noise": float((other - expected).abs().mean())}


def curve(scheme: qat.Scheme, train: Tensor, steps: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The loss of every step."""
    torch.manual_seed(0)
    return losses(qat.prepare(load(), scheme), RATE, train, steps, seed, dtype)


if __name__ == "__main__":
    main()
