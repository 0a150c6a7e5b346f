"""`kmeans_1d`: the one call that picks the way by the length of the rows and the number of clusters."""

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.kmeans import coarse, histogram, priced
from qat.numerics.kmeans.lloyd import lloyd
from qat.numerics.kmeans.moments import Moments, moments_of

# Rows longer than this have fewer bins than values.
_LONG_ROW = histogram.BINS
# Values sorted, and costs of few clusters, at once. On a CPU a quarter of that takes twice as long, in passes too short
# for two cores; on a GPU it bounds the temporaries to 3 GiB.
_VALUES_ON_CPU, _VALUES_ON_GPU = 2**22, 2**26


@torch.no_grad()
def kmeans_1d(x: Tensor, clusters: int, weights: Tensor | None = None) -> Tensor:
    """Fit `clusters` centroids to each row of `x`: least sum of weight * (value - nearest centroid)^2.

    Rows of no more values than clusters keep each of them. Rows of more than 65 536: the global optimum over their bf16
    histogram. Others: Lloyd's algorithm from the optimum of the row cut into bins, at least 64 and 7 a cluster; the
    global optimum where that holds every value, else on average 0.02 to 0.4 % above the least error for 4 to 16
    clusters, 0.1 % for more.

    Args:
        x: `[rows, n]`, finite.
        clusters: number of centroids.
        weights: `[rows, n]`, not negative; None weighs evenly, and so does a row of zeros.

    Returns:
        Centroids `[rows, clusters]` in float32, ascending; where values are fewer than clusters some repeat.

    Raises:
        InputError: if the weights have another shape than `x`, or one is negative or no number.
    """
    if weights is not None:
        _check(x, weights)
    if x.shape[1] <= clusters:
        return _padded(x, clusters)
    if x.shape[1] > _LONG_ROW:
        return histogram.fit_histogram(x, clusters, weights)
    step = _rows_at_once(x, clusters)
    found = []
    for begin in range(0, len(x), step):
        rows = slice(begin, begin + step)
        data = moments_of(x[rows], None if weights is None else weights[rows])
        found.append(lloyd(data, _start(data, clusters)))
    return torch.cat(found)


def _padded(x: Tensor, clusters: int) -> Tensor:
    """Every value of a row as its own centroid, the largest as often as is left."""
    values = x.to(torch.float32).sort(dim=1).values
    return torch.cat([values, values[:, -1:].expand(-1, clusters - x.shape[1])], dim=1)


def _start(data: Moments, clusters: int) -> Tensor:
    """Centroids close to the global optimum."""
    search = priced if clusters > coarse.MOST_CLUSTERS else coarse
    return data.means(search.optimum(data, clusters))


def _rows_at_once(x: Tensor, clusters: int) -> int:
    # The search for many clusters bounds its memory itself.
    bins = 0 if clusters > coarse.MOST_CLUSTERS else min(coarse.bins_for(clusters), x.shape[1])
    return max(1, (_VALUES_ON_CPU if x.device.type == "cpu" else _VALUES_ON_GPU) // max(x.shape[1], bins**2))


def _check(x: Tensor, weights: Tensor) -> None:
    if weights.shape != x.shape:
        raise InputError(f"Importance {list(weights.shape)} does not match {list(x.shape)}: give one for each value.")
    if not ((weights >= 0) & torch.isfinite(weights)).all():
        raise InputError("Importance holds negative values or NaN: give squared gradients, or other sizes from 0 on.")
