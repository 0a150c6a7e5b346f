"""The global optimum of one-dimensional k-means by dynamic programming."""

from typing import NamedTuple

import torch
from torch import Tensor

from qat.numerics.kmeans.moments import moments_of, with_ends


@torch.no_grad()
def optimal_kmeans_1d(x: Tensor, clusters: int, weights: Tensor | None = None) -> Tensor:
    """Centroids of the least weighted squared error of each row, whatever it costs: for few rows, and to compare with.

    Time O(clusters n log n) a row, about 3 us a value for 16 clusters on a CPU; memory about 100 bytes a value and
    4 more for every cluster.

    Args:
        x: `[rows, n]`, finite.
        clusters: number of centroids.
        weights: `[rows, n]`, not negative; None weighs evenly.

    Returns:
        Centroids `[rows, clusters]` in float32, ascending.
    """
    data = moments_of(x, weights)
    return data.means(optimal_edges(data.mass, data.moment, clusters))


def optimal_edges(mass: Tensor, moment: Tensor, clusters: int) -> Tensor:
    """Edges `[rows, clusters + 1]` of the intervals with the least squared error.

    least[k][j] = min over i <= j of least[k - 1][i] + cost(i, j); the best i never falls as j grows, so the middle j
    of a range halves what is left to search for the others (optimal k-means clustering in one dimension by dynamic
    programming, Wang and Song 2011; divide and conquer as in Gronlund et al., arXiv 1701.07204). All rows and all
    middles of one depth are searched at once.

    Args:
        mass: running sum of the weights, `[rows, n + 1]` float64.
        moment: running sum of weight * value, likewise.
        clusters: number of intervals; some are empty where fewer do.
    """
    # Centred, so that the squares that are compared are as small as they can be.
    sums = Sums(mass, moment - mass * (moment[:, -1:] / mass[:, -1:]))
    rows, size = mass.shape
    ends = torch.arange(size, device=mass.device).expand(rows, -1)
    least = -_gain(sums, torch.zeros_like(ends), ends)
    choices = []
    for _ in range(clusters - 1):
        least, choice = _one_more(least, sums)
        choices.append(choice)
    at = torch.full((rows, 1), size - 1, device=mass.device)
    path = []
    for choice in reversed(choices):
        at = choice.gather(1, at).to(torch.int64)
        path.append(at)
    return with_ends(torch.cat(path[::-1], dim=1) if path else at[:, :0], size - 1)


class Sums(NamedTuple):
    """Running sums `[rows, n + 1]` of weights and of weight * value."""

    mass: Tensor
    moment: Tensor


def _gain(sums: Sums, start: Tensor, end: Tensor) -> Tensor:
    """By how much one cluster of [start, end) lowers the squared error of a row: (sum of w x)^2 / (sum of w)."""
    mass, moment = (field.gather(1, end) - field.gather(1, start) for field in sums)
    return moment.square_().div_(torch.where(mass > 0, mass, torch.inf))


def _one_more(least: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """Allow one cluster more.

    Args:
        least: least error of every prefix of a row with the clusters so far, `[rows, n + 1]`.

    Returns:
        The same with one cluster more, and where that last cluster begins, int32.
    """
    rows, size = least.shape
    lower = torch.zeros_like(least)
    choice = torch.zeros(rows, size, dtype=torch.int64, device=least.device)
    step = 1 << (size - 1).bit_length() >> 1
    while step:
        ends = torch.arange(step, size, 2 * step, device=least.device)
        after = ends + step
        low = choice[:, ends - step]
        high = torch.where(after < size, choice[:, after.clamp(max=size - 1)], ends)
        # Rounding may put two equally good choices out of order: no range may become empty.
        high = torch.maximum(torch.minimum(high, ends), low)
        lower[:, ends], choice[:, ends] = _best_starts(least, sums, low, high, ends)
        step >>= 1
    return lower, choice.to(torch.int32)


def _best_starts(least: Tensor, sums: Sums, low: Tensor, high: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """For each prefix `[0, ends)`, the least error over starts of its last cluster in `[low, high]`, and that start."""
    rows, size = least.shape
    lengths = (high - low + 1).view(-1)
    segment = torch.repeat_interleave(lengths)
    begins = lengths.cumsum(0) - lengths
    start = torch.arange(len(segment), device=least.device) - begins[segment] + low.view(-1)[segment]
    base = segment.div(len(ends), rounding_mode="floor") * size
    flat = Sums(*(field.reshape(1, -1) for field in sums))
    error = (
        least.view(-1)[base + start] - _gain(flat, (base + start)[None], (base + ends[segment % len(ends)])[None])[0]
    )
    best = torch.full_like(begins, torch.inf, dtype=error.dtype).scatter_reduce_(0, segment, error, "amin")
    tied = torch.where(error == best[segment], start, size)
    first = torch.full_like(begins, size).scatter_reduce_(0, segment, tied, "amin")
    return best.view(rows, -1), first.view(rows, -1)
