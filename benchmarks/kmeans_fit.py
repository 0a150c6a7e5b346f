"""How long k-means takes to fit and to refresh codebooks, and how far it stays above the least possible error.

    python -m benchmarks.kmeans_fit --weights 1e9    on the GPU where there is one, or --device cpu;
                                                     writes results/kmeans_fit_cuda.json or kmeans_fit_cpu.json

Weights are random, of a normal and of a heavy-tailed distribution (Student's t, 4 degrees of freedom), made and fitted
in parts of at most 2^26 so that a billion of them need no memory; only the fitting is timed, and the median part counts
for all, so that a busy neighbour does not. The gap is that of the squared error to the exact dynamic program on 32
rows. A refresh is timed on one part.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.record import record
from qat.numerics.kmeans import kmeans_1d, optimal_kmeans_1d
from qat.quantizers import KMeansQuantizer

ROW = 2048
PART = 2**26
SHARINGS = {"per row": ROW, "per group of 64": 64, "per tensor": None}
CASES = [
    *(("per row", clusters, kind) for clusters in (4, 8, 16) for kind in ("normal", "heavy")),
    ("per group of 64", 8, "normal"),
    ("per tensor", 16, "normal"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, default=2e7, help="how many to fit in each row of the result")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    count = max(ROW, int(options.weights) // ROW * ROW)
    rows = []
    for case in track(CASES, description="fitting"):
        rows.append(measure(*case, count, torch.device(options.device)))
        print(rows[-1])
    command = f"python -m benchmarks.kmeans_fit --weights {options.weights:g} --device {options.device}"
    record(f"kmeans_fit_{options.device}", command, rows)


def measure(sharing: str, clusters: int, kind: str, count: int, device: torch.device) -> dict[str, Any]:
    """One row of the result."""
    part = min(PART, count)
    width = SHARINGS[sharing] or part
    generator = torch.Generator(device).manual_seed(0)
    x = weights(part, kind, device, generator).view(-1, width)
    kmeans_1d(x[: max(1, len(x) // 16)], clusters)  # warm up
    seconds = statistics.median(timed(lambda: kmeans_1d(x, clusters), device) for _ in range(0, count, part))
    quantizer = KMeansQuantizer(x.shape, entries=clusters).to(device)
    quantizer.initialize(x)
    quantizer.refresh(x)
    refresh = min(timed(lambda: quantizer.refresh(x), device) for _ in range(3))
    return {
        "weights": count,
        "clusters": clusters,
        "sharing": sharing,
        "distribution": kind,
        "seconds": seconds * count / part,
        "gap_percent": gap(x, clusters),
        "refresh_seconds": refresh * count / part,
    }


def weights(count: int, kind: str, device: torch.device, generator: torch.Generator) -> Tensor:
    """`count` bf16 weights; heavy: a normal number over the root of the mean of four squared ones."""
    x = torch.randn(count, device=device, generator=generator)
    if kind == "heavy":
        spread = torch.zeros_like(x)
        for _ in range(4):
            spread += torch.randn(count, device=device, generator=generator).square_()
        x /= spread.div_(4).sqrt_()
    return x.mul_(0.02).to(torch.bfloat16)


def gap(x: Tensor, clusters: int) -> float:
    """By how many percent the error of the fit exceeds the least, on 32 rows of at most 2^18 values."""
    sample = x[:32, : 2**18]
    found, least = (error(sample, fit(sample, clusters)) for fit in (kmeans_1d, optimal_kmeans_1d))
    return 100 * (float(found) / float(least) - 1)


def error(x: Tensor, centroids: Tensor) -> Tensor:
    """Squared error of the nearest centroids, over everything."""
    boundaries = ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()
    nearest = centroids.gather(1, torch.searchsorted(boundaries, x.to(torch.float32)))
    return (x.to(torch.float64) - nearest).square().sum()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `work`, to its end on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
