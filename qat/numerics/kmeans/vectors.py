"""k-means in a few dimensions, for vector codebooks."""

import torch
from torch import Tensor

# Points that a centroid is fitted to; more change a centroid by less than its rounding.
_POINTS_PER_CLUSTER = 256


@torch.no_grad()
def kmeans_vectors(x: Tensor, clusters: int, iterations: int = 30) -> Tensor:
    """Fit `clusters` centroids to the points of each row by Lloyd's algorithm, on a random sample of them.

    An empty cluster restarts at the point that is farthest from its centroid. Deterministic.

    Args:
        x: `[rows, n, dimensions]`, finite.
        clusters: number of centroids.
        iterations: upper limit; stops when nothing moves.

    Returns:
        Centroids `[rows, clusters, dimensions]` in float32.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x.shape[1], generator=generator)[: clusters * _POINTS_PER_CLUSTER].to(x.device)
    points = x[:, order].to(torch.float32)
    start = torch.arange(clusters, device=x.device) % points.shape[1]
    centroids = points[:, start].clone()
    for _ in range(iterations):
        moved = _step(points, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _step(points: Tensor, centroids: Tensor) -> Tensor:
    """Move every centroid to the mean of the points nearest to it."""
    rows, clusters, _ = centroids.shape
    distance, nearest = torch.cdist(points, centroids).min(2)
    sums = torch.zeros_like(centroids).scatter_add_(1, nearest[..., None].expand(points.shape), points)
    counts = torch.zeros(rows, clusters, device=points.device).scatter_add_(1, nearest, torch.ones_like(distance))
    means = sums / counts.clamp(min=1)[..., None]
    # The k-th empty cluster of a row takes its k-th farthest point.
    empty = counts == 0
    rank = (empty.cumsum(1) - 1).clamp(0, points.shape[1] - 1)
    farthest = distance.argsort(1, descending=True).gather(1, rank)
    return torch.where(empty[..., None], points.gather(1, farthest[..., None].expand(centroids.shape)), means)
