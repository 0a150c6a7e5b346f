"""Lloyd's algorithm on sorted rows."""

import torch
from torch import Tensor

from qat.numerics.kmeans.moments import Moments


def lloyd(data: Moments, centroids: Tensor, iterations: int = 20) -> Tensor:
    """Move every centroid to the mean of its nearest values, until none moves or `iterations` are over.

    With running sums an iteration costs O(clusters log n) a row instead of O(n). (Least squares quantization in PCM,
    Lloyd 1982.) It finds a local optimum; `qat.numerics.kmeans.fit` starts it near the global one.

    Args:
        data: sorted rows.
        centroids: `[rows, clusters]`, ascending.

    Returns:
        Centroids `[rows, clusters]` in float32, ascending. One without members moves into the cell with the largest
        squared error, or stays where it is if there is none.
    """
    for _ in range(iterations):
        edges = data.nearest_edges(centroids)
        mass, moment = data.between(edges)
        alive = mass > 0
        moved = torch.where(alive, (moment / torch.where(alive, mass, 1)).to(torch.float32), centroids)
        some_dead = ~alive.all(1)
        if some_dead.any():
            own = Moments(*(field[some_dead] for field in data))
            moved[some_dead] = _revived(own, edges[some_dead], moved[some_dead], alive[some_dead])
        moved = moved.sort(dim=1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _revived(data: Moments, edges: Tensor, centroids: Tensor, alive: Tensor) -> Tensor:
    """The k-th dead centroid of a row and that of its k-th worst cell become the means of that cell's two halves.

    Args:
        data: sorted rows.
        edges: of the cells, `[rows, clusters + 1]`.
        centroids: their means, `[rows, clusters]`.
        alive: which of them have members.
    """
    worst = data.squared_errors(edges).argsort(dim=1, descending=True)
    cell = worst.gather(1, ((~alive).cumsum(1) - 1).clamp(min=0))
    begin, end = edges.gather(1, cell), edges.gather(1, cell + 1)
    centre = centroids.gather(1, cell)
    cut = torch.searchsorted(data.values, centre)
    (low, low_mass), (high, high_mass) = (data.mean_between(*ends) for ends in ((begin, cut), (cut, end)))
    split = ~alive & (low_mass > 0) & (high_mass > 0)
    shifted = centroids.scatter_add(1, cell, torch.where(split, low - centre, 0))
    return torch.where(split, high, shifted)
