"""Packed linear layers on a GPU against bf16 and against other libraries' kernels.

    python -m benchmarks.kernels                       needs a GPU; writes results/kernels.json
    python -m benchmarks.kernels --check               only compares with the definition, in a minute
    python -m benchmarks.kernels --formats int4-g64 nf4-g64 --shapes 4096x4096 --tokens 1 16
    python -m benchmarks.kernels --tune                tries launches and prints lines for qat/kernels/.../choice.py

y = x W^T for M tokens, groups of 64, x and y in bf16. Each figure is the median of 20 replays of a CUDA graph that goes
around a ring of weights larger than four times the cache; `eager_us` is a call from Python, with the host's time, and
`first_s` the first call of a format and size, with its compilation. Peers and bf16 cuBLAS run in the same process, one
after the other for each row. `roofline_share` is the time that memory (4.3 TB/s) or tensor cores (790 TFLOP/s) of an
H200 would need, over ours. `resident_bytes` counts what the layer keeps: codes, scales, tables; layers that are
dequantized share one matrix more. A row appears only after its result agreed with a float32 product of the dequantized
weight to 1e-2, twice with the same bits, in memory that was full of NaN. Rows that `--work` holds are kept.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.agreement import agreed
from benchmarks.kernel_peers import PEERS, Peer
from benchmarks.record import commit, keep_row, record, rows_so_far
from qat.kernels.quantized_linear import ops, reference
from qat.kernels.quantized_linear.choice import choice
from qat.kernels.quantized_linear.launches import key_of
from qat.kernels.quantized_linear.tuning import copies, fastest_first, relative_error
from qat.kernels.quantized_linear.weight import TiledWeight, tiled
from qat.kernels.timing import microseconds, ring
from qat.numerics.codebooks import NF4
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.qtensor import QParams, QuantizedTensor

SHAPES = ["4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192"]
TOKENS = [1, 4, 16, 32, 64, 128, 256, 512, 2048]
Row = dict[str, Any]


class Kind(NamedTuple):
    """A format of weights: of the project, with what codebook; `peer` names those who have the same."""

    format: str
    codebook: str = ""
    group: int = 64
    peer: str = ""


FORMATS = {
    "int4-g64": Kind("int4", peer="int4"),
    "uint4-g64": Kind("uint4", "zero", peer="int4"),
    "nf4-g64": Kind("codebook16", "nf4", peer="nf4"),
    "kmeans4-row": Kind("codebook16", "rows"),
    "kmeans4-grid": Kind("codebook16", "grid"),
    "int3-g64": Kind("int3"),
    "kmeans3-row": Kind("codebook8", "rows"),
    "kmeans3-one": Kind("codebook8", "one"),
    "int2-g64": Kind("int2"),
    "kmeans2-row": Kind("codebook4", "rows"),
    "kmeans2-one": Kind("codebook4", "one"),
    "ternary": Kind("levels3"),
    "int8-row": Kind("int8", group=0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--work", type=Path, default=Path(f"outputs/kernels-{commit()}.jsonl"), help="rows so far")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--tune", action="store_true", help="try launches")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU.")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.check:
        return check(options.formats, options.tokens)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    if options.tune:
        return tune(options.formats, shapes, options.tokens)
    for shape in shapes:
        for name in options.formats:
            measure(name, shape, options.tokens, options.work)
    rows = list(rows_so_far(options.work))
    record("kernels", "python -m benchmarks.kernels", rows, ("triton", "gemlite", "bitsandbytes", "torchao"))
    return None


def quantized(name: str, shape: tuple[int, int]) -> QuantizedTensor:
    """A random weight."""
    kind = FORMATS[name]
    format, granularity = (
        parse_format(kind.format),
        parse_granularity(f"per_group_{kind.group}" if kind.group else "per_channel"),
    )
    low, high = format.code_range
    codes = torch.randint(low, high + 1, shape, device="cuda", dtype=torch.int16).to(format.code_dtype)
    scale = (torch.rand(granularity.param_shape(shape), device="cuda") * 0.02 + 0.01).bfloat16()
    zero = torch.randint(low, high + 1, scale.shape, device="cuda").float() if kind.codebook == "zero" else None
    table = codebook(kind.codebook, shape[0], high + 1)
    return QuantizedTensor(codes, QParams(scale, zero, table), format, granularity, torch.bfloat16)


def codebook(kind: str, rows: int, entries: int) -> Tensor | None:
    if kind == "nf4":
        return torch.tensor(NF4, device="cuda", dtype=torch.bfloat16).view(1, 1, -1)
    if kind == "grid":
        return ((torch.randperm(128, device="cuda")[:entries] - 64) / 64).sort().values.view(1, 1, -1)
    if kind in ("rows", "one"):
        return torch.randn(rows if kind == "rows" else 1, 1, entries, device="cuda").sort().values.bfloat16()
    return None


def product_error(x: Tensor, weight: TiledWeight, what: str) -> float:
    """The error of the product, if `agreed`."""
    exact = reference.quantized_linear(x.float(), weight, None)
    room = 128 * len(x) * weight.layout.rows
    return agreed(lambda: ops.quantized_linear(x, weight), lambda y: relative_error(y, exact), room, what)


def check(names: list[str], tokens: list[int]) -> None:
    for name in names:
        for shape in ((4096, 4096), (1000, 1600)):
            weight = tiled(quantized(name, shape))
            assert weight is not None
            for count in tokens:
                x = torch.randn(count, shape[1], device="cuda").bfloat16()
                error = product_error(x, weight, f"{name} {shape} M={count}")
                print(f"{name} {shape[0]}x{shape[1]} M={count}: error {error:.1e}", flush=True)


def measure(name: str, shape: tuple[int, int], tokens: list[int], work: Path) -> None:
    """Rows of one format and shape."""
    done = {(row["format"], row["N"], row["K"], row["M"]) for row in rows_so_far(work)}
    wanted = [count for count in tokens if (name, *shape, count) not in done]
    if not wanted:
        return
    q = quantized(name, shape)
    weight = tiled(q)
    assert weight is not None
    weight.words_for(torch.bfloat16)
    held = sum(tensor.nbytes for tensor in weight.tensors())
    dense = ring(lambda: (torch.randn(shape, device="cuda", dtype=torch.bfloat16),), 2 * shape[0] * shape[1])
    peers = [peer for peer in PEERS if FORMATS[name].peer in peer.kinds]
    made = {peer.name: peer_ring(peer, q) for peer in peers}
    for count in wanted:
        x = torch.randn(count, shape[1], device="cuda").bfloat16()
        torch.cuda.synchronize()
        start = time.perf_counter()
        ops.quantized_linear(x, weight)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        row = {
            "op": "quantized_linear",
            "format": name,
            "group": FORMATS[name].group,
            "N": shape[0],
            "K": shape[1],
            "M": count,
        }
        row |= {"rel_error": product_error(x, weight, f"{name} {shape} M={count}"), "deterministic": True}
        with torch.no_grad():
            row["us"] = microseconds(lambda w, x=x: ops.quantized_linear(x, w), copies(weight))
            row["bf16_us"] = microseconds(lambda w, x=x: F.linear(x, w), dense)
            row["eager_us"] = eager_microseconds(x, weight)
            row["peers"] = {peer: microseconds(lambda f, x=x: f(x), own) for peer, own in made.items() if own}
        row |= {"speedup": row["bf16_us"] / row["us"], "roofline_share": limit_us(shape, count, held) / row["us"]}
        row |= {
            "first_s": first,
            "resident_bytes": held,
            "kernel": type(choice(weight, count, torch.cuda.get_device_name())).__name__,
        }
        keep_row(work, row)


def peer_ring(peer: Peer, q: QuantizedTensor) -> list[Any]:
    """Layers of a peer, in the ring; none where it does not run here."""
    try:
        functions = ring(lambda: (peer.layer(q),), q.codes.numel() // 2)
        functions[0][0](torch.randn(1, q.shape[1], device="cuda").bfloat16())
    except Exception as reason:
        print(f"{peer.name} is left out: {reason!r}"[:300], flush=True)
        return []
    return functions


def eager_microseconds(x: Tensor, weight: TiledWeight, calls: int = 100) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        ops.quantized_linear(x, weight)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def limit_us(shape: tuple[int, int], tokens: int, held: int) -> float:
    """What memory or tensor cores of an H200 would need."""
    rows, columns = shape
    return max((held + 2 * tokens * (rows + columns)) / 4.3e6, 2 * tokens * rows * columns / 790e6)


def tune(names: list[str], shapes: list[Any], tokens: list[int]) -> None:
    """Print the fastest launches of each case."""
    for shape in shapes:
        for name in names:
            weight = tiled(quantized(name, shape))
            assert weight is not None
            for count in tokens:
                best = fastest_first(weight, count)[:3]
                shown = [(how, round(us, 2)) for how, us in best]
                print(f"{name} {key_of(weight)}: ({count}, {best[0][0]})", shown, flush=True)


if __name__ == "__main__":
    main()
