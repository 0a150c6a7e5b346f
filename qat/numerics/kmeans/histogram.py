"""Long rows as histograms of their bf16 values: 65 536 bins hold every bf16 tensor without loss."""

import torch
from torch import Tensor

from qat.numerics.kmeans.moments import Moments
from qat.numerics.kmeans.optimal import optimal_edges

BINS = 2**16
_PIECE = 2**22


def fit_histogram(x: Tensor, clusters: int, weights: Tensor | None = None) -> Tensor:
    """Centroids `[rows, clusters]` of the least squared error among partitions that keep each bf16 value together.

    For bf16 values that is the global optimum. Others are told apart to half a unit in the last place of bf16; means
    are those of the true values. Time O(n) and memory O(1) a value, beside the bins.

    Args:
        x: `[rows, n]`, finite.
        clusters: number of centroids.
        weights: `[rows, n]`, not negative; None weighs evenly.
    """
    return torch.cat([_fit_row(row, clusters, None if weights is None else weights[i]) for i, row in enumerate(x)])


def _fit_row(row: Tensor, clusters: int, weights: Tensor | None) -> Tensor:
    if weights is not None and not (weights > 0).any():
        weights = None
    mass, moment = _bin_sums(row, weights)
    filled = mass.nonzero().squeeze(1)
    mass, moment = mass[filled][None], moment[filled][None]
    running = [torch.nn.functional.pad(field.cumsum(1), (1, 0)) for field in (mass, moment)]
    data = Moments((moment / mass).to(torch.float32), *running)
    return data.means(optimal_edges(data.mass, data.moment, clusters))


def _bin_sums(row: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of the weights and of weight * value of each bin, `[BINS]` float64."""
    mass = torch.zeros(BINS, dtype=torch.float64, device=row.device)
    moment = torch.zeros_like(mass)
    pieces = row.split(_PIECE)
    shares = [None] * len(pieces) if weights is None else weights.split(_PIECE)
    for piece, share in zip(pieces, shares, strict=True):
        bins = bf16_rank(piece)
        own = None if share is None else share.to(torch.float64)
        values = piece.to(torch.float64)
        mass += torch.bincount(bins, own, BINS)
        moment += torch.bincount(bins, values if own is None else own.mul(values), BINS)
    return mass, moment


def bf16_rank(x: Tensor) -> Tensor:
    """Position of each value, rounded to bf16, among all bf16 values: 0 ... 65 535 in int64, ascending with x."""
    bits = x.to(torch.bfloat16).view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + BINS // 2
