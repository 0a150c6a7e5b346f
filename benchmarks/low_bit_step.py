"""What products of codes cost in a step, part by part: the products, the codes of gradients and weights, transposes.

    python -m benchmarks.low_bit_step          needs a GPU; writes results/low_bit_step.json
    python -m benchmarks.low_bit_step --shapes 1b --computes fp8
    python -m benchmarks.low_bit_step --tiny   the same code at toy size, on any machine; on a CPU it writes nothing

The linear layers of a Llama of one billion parameters (`1b`) and of eight (`8b`), [in, out] each, for 8192 tokens.
`share` is the time of a part over that of the products in bf16 which it serves: `weight codes` serve the forward
product, `gradient codes` both of the backward pass, `transposed weight` dgrad and `transposed input` wgrad. `all` is
everything together over the three products in bf16. The codes of the input are not in it, since a compiler finds them
with what makes the input.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.record import record
from qat.kernels import product_ops
from qat.kernels.scaled_product.operand import Operand
from qat.kernels.timing import microseconds, ring
from qat.numerics.formats import Format, parse_format
from qat.numerics.granularity import PerToken

TOKENS = 8192
SHAPES = {
    "1b": [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)],
    "8b": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
}
# Formats of weights and inputs, and of gradients.
FORMATS = {"int8": ("int8", "int8"), "fp8": ("fp8_e4m3", "fp8_e5m2")}
Row = dict[str, Any]


class Part(NamedTuple):
    """Something that is timed: a function of what `make` makes, about `bytes_each` in memory."""

    name: str
    serves: str
    function: Callable[..., Any]
    make: Callable[[], Sequence[Any]]
    bytes_each: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy size, on any machine")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--computes", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("This needs a CUDA GPU; --tiny runs the same code at toy size anywhere.")
    torch.manual_seed(0)
    shapes = {"toy": [(32, 48)]} if options.tiny else {name: SHAPES[name] for name in options.shapes}
    rows = [
        row
        for model, layers in shapes.items()
        for size_in, size_out in layers
        for row in measure(model, 64 if options.tiny else TOKENS, size_in, size_out, options.computes, device)
    ]
    if device == "cuda" and not options.tiny:
        chosen = f"--shapes {' '.join(options.shapes)} --computes {' '.join(options.computes)}"
        record("low_bit_step", f"python -m benchmarks.low_bit_step {chosen}", rows, ("triton",))


def measure(model: str, tokens: int, size_in: int, size_out: int, computes: Sequence[str], device: str) -> list[Row]:
    """One row for each part of a layer, printed as it is found."""
    sizes = {"model": model, "tokens": tokens, "in": size_in, "out": size_out}
    rows: list[Row] = []

    def note(part: Part, compute: str, bf16_us: float | None = None) -> float:
        us = timed(part, device)
        share = None if bf16_us is None else us / bf16_us
        rows.append(sizes | {"compute": compute, "part": part.name, "serves": part.serves, "us": us, "share": share})
        print(rows[-1], flush=True)
        return us

    bf16 = {part.serves: note(part, "bf16") for part in in_bf16(tokens, size_in, size_out, device)}
    whole = sum(bf16.values())
    bf16["backward"] = bf16["dgrad"] + bf16["wgrad"]
    for compute in computes:
        parts = in_codes(tokens, size_in, size_out, compute, device)
        total = sum(note(part, compute, bf16[part.serves]) for part in parts)
        share = total / whole
        rows.append(sizes | {"compute": compute, "part": "all", "serves": "all", "us": total, "share": share})
        print(rows[-1], flush=True)
    return rows


def in_bf16(tokens: int, size_in: int, size_out: int, device: str) -> list[Part]:
    """The three products of a linear layer."""
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, w, g = (partial(random, *shape) for shape in [(tokens, size_in), (size_out, size_in), (tokens, size_out)])
    return [
        Part("product", "forward", lambda x, w: x @ w.T, lambda: (x(), w()), 2 * (tokens + size_out) * size_in),
        Part("product", "dgrad", lambda g, w: g @ w, lambda: (g(), w()), 2 * (tokens + size_in) * size_out),
        Part("product", "wgrad", lambda g, x: g.T @ x, lambda: (g(), x()), 2 * (size_in + size_out) * tokens),
    ]


def in_codes(tokens: int, size_in: int, size_out: int, compute: str, device: str) -> list[Part]:
    """What takes their place, and what makes codes for it."""
    own, grad = (parse_format(name) for name in FORMATS[compute])
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)

    def operand(rows: int, k: int, format: Format, scaled: bool = True) -> Operand:
        scale = torch.rand(rows, 1, device=device) if scaled else None
        return Operand(codes(rows, k, format), scale, format)

    def codes(rows: int, k: int, format: Format) -> Tensor:
        return format.encode(torch.randn(rows, k, device=device))

    def gradient() -> tuple[Tensor, Tensor, Tensor]:
        return random(tokens, size_out), torch.rand(1, size_out, device=device), torch.rand(tokens, 1, device=device)

    def found(weight: Tensor) -> tuple[Tensor, Tensor]:
        return product_ops._row_codes_of(weight, torch.float32, own.name)

    t, i, o = tokens, size_in, size_out
    product = partial(product_ops.scaled_product, dtype=torch.bfloat16)
    drawn = partial(
        product_ops.gradient_codes, format=grad, granularity=PerToken(), scale_dtype=torch.float32, stochastic=True
    )
    return [
        Part("weight codes", "forward", found, lambda: (random(o, i),), 3 * o * i),
        Part("product", "forward", product, lambda: (operand(t, i, own), operand(o, i, own)), (t + o) * i),
        Part("gradient codes", "backward", drawn, gradient, 4 * t * o),
        Part("transposed weight", "dgrad", product_ops.transposed_codes, lambda: (codes(o, i, own),), 2 * o * i),
        Part("product", "dgrad", product, lambda: (operand(t, o, grad), operand(i, o, own, False)), (t + i) * o),
        Part("transposed input", "wgrad", product_ops.transposed_codes, lambda: (codes(t, i, own),), 2 * t * i),
        Part("product", "wgrad", product, lambda: (operand(o, t, grad), operand(i, t, own, False)), (o + i) * t),
    ]


def timed(part: Part, device: str) -> float:
    """Microseconds of one call; on a CPU the median of a few, to show that it runs."""
    if device == "cuda":
        return microseconds(part.function, ring(part.make, part.bytes_each))
    arguments, seconds = part.make(), []
    for _ in range(3):
        start = time.perf_counter()
        part.function(*arguments)
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


if __name__ == "__main__":
    main()
