"""How close fake quantization comes to the speed of copying, forward, backward and with scales from the data.

    python -m benchmarks.fake_quantize           needs a GPU, five minutes; writes results/fake_quantize.json; resumes
    python -m benchmarks.fake_quantize --check   only compares the kernels with the references

Tensors are bf16. `copy_share` is the time that copying as many bytes takes, over that of the kernel: the forward pass
reads and writes a tensor, the backward pass reads two (x and the gradient) and writes two (its gradient and x_hat,
which a linear layer needs again). The peer is the same arithmetic in plain PyTorch, fused by torch.compile. Every
kernel is compared with the reference before it is timed.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import commit, kept, record
from qat.kernels import ops
from qat.kernels.timing import microseconds, ring
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import Format, parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.qtensor import ViewParams, scale_down, unscale

# The last two are short for a GPU: a weight of SmolLM2-135M, and fewer elements than programs that fill it.
SHAPES = [(4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336), (576, 1536), (2048, 512)]
STATIC = [
    *(("int4", "per_group_64"), ("int4", "per_channel"), ("int8", "per_tensor"), ("uint4", "per_group_64")),
    *(("levels4", "per_group_64"), ("fp8_e4m3", "per_channel"), ("fp4_e2m1", "per_group_32")),
    *(("codebook8", "per_channel"), ("codebook16", "per_channel"), ("codebook16", "per_group_64")),
]
DYNAMIC = [
    *(("int8", "per_token", "absmax"), ("uint8", "per_token", "minmax"), ("fp8_e4m3", "per_token", "absmax")),
    *(("fp4_e2m1", "per_group_32", "microscaling"), ("int4", "per_group_64", "absmax")),
]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, large ones first")
    parser.add_argument("--work", type=Path, default=Path("outputs/fake_quantize"), help="where rows are kept")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU.")
    torch.manual_seed(0)
    check()
    if options.check:
        return
    rows: list[Row] = []
    for shape in SHAPES[: options.shapes]:
        rows += kept(options.work / f"{shape[0]}x{shape[1]}-{commit()}.json", partial(measure, shape))
    record("fake_quantize", f"python -m benchmarks.fake_quantize --shapes {options.shapes}", rows, ("triton",))


def measure(shape: tuple[int, int]) -> list[Row]:
    """Every grid on tensors of `shape`."""
    each = 2 * shape[0] * shape[1]
    copies = ring(lambda: (torch.empty(shape, device="cuda", dtype=torch.bfloat16), tensor(shape)), 2 * each)
    copy_us = microseconds(lambda out, x: out.copy_(x), copies)
    rows = []
    for name, spelling in STATIC:
        sets = ring(lambda n=name, s=spelling: static_case(n, s, shape), 4 * each)
        rows.append(row(name, spelling, shape, "forward", forward, peer_forward, sets, copy_us))
        rows.append(row(name, spelling, shape, "backward", backward, peer_backward, sets, 2 * copy_us))
        print(rows[-2], rows[-1], sep="\n", flush=True)
    for name, spelling, rule in DYNAMIC:
        sets = ring(lambda s=spelling: (parse_granularity(s).view(tensor(shape)),), each)
        ours, peer = (partial(f, rule=rule, name=name) for f in (dynamic, peer_dynamic))
        rows.append(row(name, spelling, shape, rule, ours, peer, sets, copy_us))
        print(rows[-1], flush=True)
    return rows


def row(
    name: str,
    spelling: str,
    shape: tuple[int, int],
    direction: str,
    ours: Callable[..., Any],
    peer: Callable[..., Any],
    sets: Any,
    copy_us: float,
) -> Row:
    torch._dynamo.reset()
    us, peer_us = microseconds(ours, sets), microseconds(torch.compile(peer, dynamic=False), sets)
    row = {"format": name, "granularity": spelling, "shape": list(shape), "direction": direction}
    return row | {"us": us, "copy_share": copy_us / us, "peer_us": peer_us, "peer_name": "torch.compile"}


def tensor(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def static_case(name: str, spelling: str, shape: tuple[int, int]) -> tuple[Any, ...]:
    """x, the gradient and room for x_hat as views, and a grid that clips some of x."""
    format, granularity = parse_format(name), parse_granularity(spelling)
    x, g, out = (granularity.view(tensor(shape)) for _ in range(3))
    scale = (2.5 / format.range()[1]) * (0.8 + 0.4 * torch.rand(len(x), 1, device="cuda"))
    zero_point = torch.full_like(scale, 7.0) if name.startswith("u") else None
    entries = getattr(format, "entries", None)
    rows = len(x) if spelling == "per_channel" else 1
    codebook = None if entries is None else torch.randn(rows, entries, device="cuda").sort().values
    return x, g, out, scale, zero_point, codebook, name


def needs(codebook: Tensor | None) -> list[bool]:
    """Scales of integers and floats learn as with LSQ, codebooks alone as with k-means."""
    return [codebook is None, codebook is None, False, codebook is not None]


def forward(x: Tensor, g: Tensor, out: Tensor, *grid: Any) -> Tensor:
    return ops.fake_quantize_view(x, x.dtype, *grid)


def backward(x: Tensor, g: Tensor, out: Tensor, *grid: Any) -> Any:
    return ops._fake_quantize_backward_(g, x, None, out, needs(grid[2]), *grid)


def dynamic(x: Tensor, rule: str, name: str) -> Tensor:
    return ops.fake_quantize_dynamic_view(x, x.dtype, rule, _storage(rule), None, name)


def _storage(rule: str) -> torch.dtype:
    return torch.float8_e8m0fnu if rule == "microscaling" else torch.bfloat16


def peer_forward(x: Tensor, g: Tensor, out: Tensor, *grid: Any) -> Tensor:
    return plain(x, ViewParams(*grid[:3]), parse_format(grid[3]))[0]


def plain(x: Tensor, params: ViewParams, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """x_hat, v and the codes, by the definition."""
    v = scale_down(x, params)
    codes = format.encode(v, params.codebook)
    return unscale(format.decode(codes, params.codebook), params).to(x.dtype), v, codes


def peer_backward(x: Tensor, g: Tensor, out: Tensor, *grid: Any) -> Any:
    """The equations of `qat.kernels.fake_quantize.reference`."""
    params, format = ViewParams(*grid[:3]), parse_format(grid[3])
    x_hat, v, codes = plain(x, params, format)
    dx, own = g.float(), x.float()
    if format.saturates:
        low, high = format.range()
        dx = torch.where((v >= low) & (v <= high), dx, 0.0)
    if params.codebook is not None:
        rows = len(params.codebook)
        share = (g.float() * params.scale).view(rows, -1)
        dcodebook = torch.zeros_like(params.codebook).scatter_add(1, codes.long().view(rows, -1), share)
        return x_hat, dcodebook
    return x_hat, dx.to(g.dtype), (g.float() * x_hat.float() - dx * own).sum(1, keepdim=True) / params.scale


def peer_dynamic(x: Tensor, rule: str, name: str) -> Tensor:
    format = parse_format(name)
    return plain(x, DYNAMIC_RULES[rule](x, format, _storage(rule)), format)[0]


def check() -> None:
    """The kernels compute what the references do."""
    for name, spelling in STATIC:
        x, g, out, *grid = static_case(name, spelling, (256, 1024))
        found = [forward(x, g, out, *grid), *backward(x, dx := g.clone(), out, *grid), dx, out]
        with ops.reference_kernels():
            x_hat = forward(x, g, out, *grid)
            expected = [x_hat, *backward(x, reference_dx := g.clone(), reference_out := out.clone(), *grid)]
            expected += [reference_dx, reference_out]
        for a, b in zip(found, expected, strict=True):
            if b.numel():
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        assert torch.equal(found[0], x_hat), name
    for name, spelling, rule in DYNAMIC:
        x = parse_granularity(spelling).view(tensor((256, 1024)))
        found_hat = dynamic(x, rule, name)
        with ops.reference_kernels():
            assert torch.equal(found_hat, dynamic(x, rule, name)), (name, rule)
    print("the kernels compute what the references do", flush=True)


if __name__ == "__main__":
    main()
