"""Lloyd's algorithm on sorted rows."""

import torch
from torch import Tensor

from qat.numerics.kmeans.moments import Moments


def lloyd(data: Moments, centroids: Tensor, iterations: int = 20) -> Tensor:
    """Move every centroid to the mean of its nearest values, until none moves or `iterations` are over.

    With running sums an iteration costs O(clusters log n) a row instead of O(n). (Least squares quantization in PCM,
    Lloyd 1982.) It finds a local optimum; `qat.numerics.kmeans.coarse` starts it near the global one.

    Args:
        data: sorted rows.
        centroids: `[rows, clusters]`, ascending.

    Returns:
        Centroids `[rows, clusters]` in float32, ascending. One without members stays where it is.
    """
    for _ in range(iterations):
        mass, moment = data.between(data.nearest_edges(centroids))
        means = (moment / torch.where(mass > 0, mass, 1)).to(torch.float32)
        moved = torch.where(mass > 0, means, centroids).sort(dim=1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids
