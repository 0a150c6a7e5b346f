"""Attention of one new token to a quantized cache, on a GPU, against bf16 scaled_dot_product_attention.

    python -m benchmarks.attention_decode              needs a GPU; writes results/attention_decode.json
    python -m benchmarks.attention_decode --check      only compares with the definition, in a minute
    python -m benchmarks.attention_decode --layouts kv4 kv2 --tokens 32768 --batches 8
    python -m benchmarks.attention_decode --tune       tries launches, for CHOICES of .../attention_decode/triton.py

The heads of Llama-8B: 32 of queries, 8 of keys and values, of 128 dimensions; no mask. Layouts are those of
benchmarks/kv_cache.py, with a scale and a zero point for each token and head, or KIVI's with its residual. Each
figure is the median of 20 replays of a CUDA graph that goes around a ring of caches larger than four times the GPU's
own cache. bf16 is the fastest of the backends that run, in the same process: with enable_gqa, and with the four heads
of a key head given as four queries. `roofline_share` is the time that memory (4.3 TB/s of an H200) would need for what
is stored, over ours. A row appears only after its result agreed with float32 to 1e-2, twice with the same bits, in
memory that was full of NaN. Rows that `--work` holds are kept.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import agreement
from benchmarks.agreement import GATE
from benchmarks.record import commit, keep_row, record, rows_so_far
from qat.kernels.attention_decode import reference
from qat.kernels.attention_decode.cached import CachedTokens
from qat.kernels.attention_decode.ops import attention_decode
from qat.kernels.timing import microseconds, ring
from qat.nn.kv_quantizer import Schedule
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.packing import packed_bytes

HEADS, KV_HEADS, DIM = 32, 8, 128
TOKENS = [2**k for k in range(10, 18)]
BATCHES = [1, 8]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
BYTES_PER_US = 4.3e6
Row = dict[str, Any]


class Layout(NamedTuple):
    """Bits of codes, who shares scales of keys and of values, and when tokens are quantized."""

    bits: int
    keys: str = "per_token"
    values: str = "per_token"
    key_schedule: Schedule = Schedule(1, 0)
    value_schedule: Schedule = Schedule(1, 0)


LAYOUTS = {
    "kv8": Layout(8),
    "kv4": Layout(4),
    "kv2": Layout(2),
    "kv2-kivi": Layout(2, "per_block_32x1", "per_group_32", Schedule(32, 32), Schedule(1, 32)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    work = Path(f"outputs/attention_decode-{commit()}.jsonl")
    parser.add_argument("--work", type=Path, default=work, help="rows so far; they are kept")
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--tune", action="store_true", help="try launches")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU.")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = list(itertools.product(options.batches, options.tokens))
    if options.check:
        return check(options.layouts)
    if options.tune:
        return tune(options.layouts, sizes)
    with torch.no_grad():
        for batch, tokens in sizes:
            measure(options.layouts, batch, tokens, options.work)
    record("attention_decode", "python -m benchmarks.attention_decode", list(rows_so_far(options.work)), ("triton",))
    return None


def query(batch: int, device: str = "cuda") -> Tensor:
    return torch.randn(batch, HEADS, 1, DIM, device=device).bfloat16()


def cache(name: str, batch: int, tokens: int, device: str = "cuda") -> tuple[CachedTokens, CachedTokens]:
    """Random keys and values of a layout."""
    layout = LAYOUTS[name]
    return (
        _stored(layout.bits, layout.keys, layout.key_schedule, batch, tokens, device),
        _stored(layout.bits, layout.values, layout.value_schedule, batch, tokens, device),
    )


def _stored(bits: int, granularity: str, schedule: Schedule, batch: int, tokens: int, device: str) -> CachedTokens:
    quantized = schedule.quantized_until(tokens)
    shape = batch, KV_HEADS, quantized, packed_bytes(DIM, bits)
    codes = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    sizes = parse_granularity(granularity).param_shape((batch, KV_HEADS, quantized, DIM))
    # Values of about unit variance, as those of the tail.
    scale = (torch.rand(sizes, device=device) * 0.5 + 0.75).bfloat16() * (3.4 / 2**bits)
    zero = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1, sizes, device=device).to(torch.uint8)
    tail = torch.randn(batch, KV_HEADS, tokens - quantized, DIM, device=device).bfloat16()
    return CachedTokens(codes, scale, zero, tail, parse_format(f"uint{bits}").name, granularity)


def bytes_of(*stored: CachedTokens) -> int:
    return sum(field.nbytes for own in stored for field in own if isinstance(field, Tensor))


def error_of(out: Tensor, q: Tensor, keys: CachedTokens, values: CachedTokens) -> float:
    """Relative Frobenius error against float32."""
    exact = reference.attention_decode(q.float(), None, DIM**-0.5, keys, values)
    return float((out.float() - exact).norm() / exact.norm())


def agreed(q: Tensor, keys: CachedTokens, values: CachedTokens, what: str) -> float:
    """The error of attention to a cache, if `agreement.agreed`."""
    return agreement.agreed(
        lambda: attention_decode(q, keys, values), lambda out: error_of(out, q, keys, values), 2**26, what
    )


def check(names: list[str]) -> None:
    for name, (batch, tokens) in itertools.product(names, ((1, 1024), (8, 1000), (2, 8191), (1, 32768))):
        error = agreed(query(batch), *cache(name, batch, tokens), f"{name} batch {batch}, {tokens} tokens")
        print(f"{name} batch {batch}, {tokens} tokens: error {error:.1e}", flush=True)


def measure(names: list[str], batch: int, tokens: int, work: Path) -> None:
    """Rows of one size."""
    done = {row["layout"] for row in rows_so_far(work) if (row["batch"], row["tokens"]) == (batch, tokens)}
    wanted = [name for name in names if name not in done]
    if not wanted:
        return
    q = query(batch)
    dense, backend = dense_microseconds(q, batch, tokens)
    for name in wanted:
        keys, values = cache(name, batch, tokens)
        held = bytes_of(keys, values)
        row = {"layout": name, "bits": LAYOUTS[name].bits, "batch": batch, "tokens": tokens, "bf16_us": dense}
        row |= {"backend": backend, "rel_error": agreed(q, keys, values, f"{name}, {tokens} tokens")}
        row["us"] = microseconds(
            lambda k, v: attention_decode(q, k, v), ring(lambda n=name: cache(n, batch, tokens), held)
        )
        row |= {"speedup": dense / row["us"], "roofline_share": held / BYTES_PER_US / row["us"], "bytes": held}
        row |= {"bf16_roofline_share": dense_bytes(batch, tokens) / BYTES_PER_US / dense, "deterministic": True}
        keep_row(work, row)


def dense_bytes(batch: int, tokens: int) -> int:
    """Of keys and values in bf16."""
    return 2 * 2 * batch * KV_HEADS * tokens * DIM


def dense_microseconds(q: Tensor, batch: int, tokens: int) -> tuple[float, str]:
    """Of the fastest way to attend in bf16, and which it is."""
    shape = batch, KV_HEADS, tokens, DIM
    sets = ring(
        lambda: [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)], dense_bytes(batch, tokens)
    )
    times = {}
    for backend, (way, attend) in itertools.product(BACKENDS, dense_ways(q).items()):
        try:
            with sdpa_kernel(backend):
                times[f"{backend.name.lower()}, {way}"] = microseconds(attend, sets)
        except RuntimeError as reason:
            print(f"{backend.name}, {way} is left out: {reason!r}"[:200], flush=True)
    best = min(times, key=times.__getitem__)
    return times[best], best


def dense_ways(q: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    grouped = q.view(len(q), KV_HEADS, HEADS // KV_HEADS, DIM)
    return {
        "enable_gqa": lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "heads as queries": lambda k, v: F.scaled_dot_product_attention(grouped, k, v).view(q.shape),
    }


def candidates() -> Iterator[Any]:
    """Launches worth trying."""
    from qat.kernels.attention_decode.triton import Choice

    for tokens, programs, registers, stages in itertools.product(
        (32, 64), (8, 12, 16, 32), (96, 128, 168, 255), (2, 3, 4)
    ):
        yield Choice(tokens, programs, 4, registers, stages)


def tune(names: list[str], sizes: list[tuple[int, int]]) -> None:
    """Print the fastest launches of each case."""
    from qat.kernels.attention_decode import triton

    before = dict(triton.CHOICES)
    for name, (batch, tokens) in itertools.product(names, sizes):
        q, (keys, values) = query(batch), cache(name, batch, tokens)
        sets = ring(lambda n=name, b=batch, t=tokens: cache(n, b, t), bytes_of(keys, values))
        times = {}
        for choice in candidates():
            triton.CHOICES[LAYOUTS[name].bits] = choice
            try:
                if error_of(attention_decode(q, keys, values), q, keys, values) < GATE:
                    times[choice] = microseconds(lambda k, v, q=q: attention_decode(q, k, v), sets)
            except Exception as reason:
                print(f"failed: {choice} {name}: {reason!r}"[:200], flush=True)
        triton.CHOICES.update(before)
        best = sorted(times, key=times.__getitem__)[:3]
        print(
            f"{name}, batch {batch}, {tokens} tokens:", [(tuple(own), round(times[own], 2)) for own in best], flush=True
        )


if __name__ == "__main__":
    main()
