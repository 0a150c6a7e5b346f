"""One-dimensional k-means for many rows at once."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def kmeans_1d(x: Tensor, clusters: int, iterations: int = 40) -> Tensor:
    """Fit `clusters` centroids to each row of `x` by Lloyd's algorithm.

    Rows are sorted once; with prefix sums an iteration then costs O(clusters log n) a row instead of O(n), because
    clusters of sorted numbers are intervals. (Least squares quantization in PCM, Lloyd 1982.)

    Args:
        x: `[rows, n]`, finite.
        clusters: number of centroids.
        iterations: upper limit; stops when no row moves.

    Returns:
        Centroids `[rows, clusters]` in float32, ascending.
    """
    ordered = x.to(torch.float32).sort(dim=1).values
    prefix = torch.nn.functional.pad(ordered.to(torch.float64).cumsum(1), (1, 0))
    low, high = ordered[:, :1].contiguous(), ordered[:, -1:].contiguous()
    centroids = _companded_start(ordered, clusters).clamp(low, high)
    ends = torch.full((len(x), 1), x.shape[1], device=x.device)
    for _ in range(iterations):
        inner = torch.searchsorted(ordered, (centroids[:, 1:] + centroids[:, :-1]) / 2)
        edges = torch.cat([torch.zeros_like(ends), inner, ends], dim=1)
        counts = edges.diff(dim=1)
        sums = prefix.gather(1, edges).diff(dim=1)
        means = (sums / counts.clamp(min=1)).to(torch.float32)
        moved = torch.where(counts > 0, means, centroids).sort(dim=1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _companded_start(ordered: Tensor, clusters: int) -> Tensor:
    """Start where a high-resolution quantizer of a normal distribution would be.

    Panter and Dite (1951): the best density of levels is the cube root of the data's density, which for a normal
    distribution is a normal distribution again, sqrt(3) times as wide.
    """
    levels = (torch.arange(clusters, device=ordered.device, dtype=torch.float32) + 0.5) / clusters
    quantiles = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    return ordered.mean(1, keepdim=True) + math.sqrt(3) * ordered.std(1, correction=0, keepdim=True) * quantiles
