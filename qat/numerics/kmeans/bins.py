"""Rows cut into bins for many clusters: about equally many bins a cluster, wherever in the row it is."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat.numerics.kmeans.moments import Moments, with_ends

# Share of the bins that follow the mass alone, so that a value that is there often has a bin of its own.
_BY_MASS = 1 / 8
# Bins that one value may claim: more are of no use, however far it lies from the others. Where claims are cut, those of
# the others grow, so that it is done some times.
_MOST_OF_A_VALUE, _CUTS = 2, 4


class Bins(NamedTuple):
    """Rows cut into bins.

    mass, mean: `[bins, rows]` float64, relative to the mass and the range of the row, so that no square vanishes or
        overflows. Rows of fewer bins are padded with bins without mass.
    filled: how many bins of each row have mass, `[rows]`.
    """

    mass: Tensor
    mean: Tensor
    filled: Tensor

    def rows(self, chosen: Tensor | slice) -> "Bins":
        return Bins(self.mass[:, chosen], self.mean[:, chosen], self.filled[chosen])


def bins_of(data: Moments, most: int) -> tuple[Tensor, Bins]:
    """Cut each row into at most about `most` bins: their edges `[rows, bins + 1]`, and what lies in them."""
    edges, filled = _filled(data, _edges(data, most))
    mass, moment = data.between(edges)
    spread = (data.values[:, -1:] - data.values[:, :1]).to(torch.float64)
    mean = moment / torch.where(mass > 0, mass, 1) / torch.where(spread > 0, spread, 1)
    return edges, Bins((mass / data.mass[:, -1:]).T.contiguous(), mean.T.contiguous(), filled)


def claimed(mass: Tensor, width: Tensor, bins: int, dim: int) -> Tensor:
    """How much of the clusters, or bins, each value would have: mass^(1/3) width^(2/3), with the width around it.

    The best density of many clusters goes with the cube root of the density of the data (Panter and Dite 1951).
    """
    claims = (mass * width.square()).pow(1 / 3)
    for _ in range(_CUTS):
        claims = torch.minimum(claims, claims.sum(dim, keepdim=True) * (_MOST_OF_A_VALUE / bins))
    return claims


def _edges(data: Moments, bins: int) -> Tensor:
    """Cut each row into `bins` intervals, about equally many a cluster, edges `[rows, bins + 1]`."""
    rows, n = data.values.shape
    if n <= bins:
        return torch.arange(n + 1, device=data.values.device).expand(rows, -1)
    gaps = data.values.to(torch.float64).diff(dim=1)
    widths = pad(gaps, (0, 1)) + pad(gaps, (1, 0))
    claims = claimed(data.mass.diff(dim=1), widths, bins, dim=1)
    share = torch.lerp(_share(claims.cumsum(1)), _share(data.mass[:, 1:]), _BY_MASS)
    cuts = torch.arange(1, bins, device=share.device, dtype=share.dtype) / bins
    return with_ends(torch.searchsorted(share, cuts.expand(rows, -1).contiguous()), n)


def _share(running: Tensor) -> Tensor:
    """A running sum relative to its end."""
    return running / running[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)


def _filled(data: Moments, edges: Tensor) -> tuple[Tensor, Tensor]:
    """`edges` of bins that all have mass and whose ends are different values, and how many bins each row has.

    An edge between equal values is moved to where they begin and to where they end. Rows of fewer bins than others are
    padded with empty ones.
    """
    n = data.values.shape[1]
    below, above = (data.values.gather(1, at) for at in ((edges - 1).clamp(min=0), edges.clamp(max=n - 1)))
    begin = torch.where(edges == n, n, torch.searchsorted(data.values, above))
    end = torch.where(edges == 0, 0, torch.searchsorted(data.values, below, right=True))
    edges = torch.cat([begin, end], dim=1).sort(dim=1).values
    fresh = pad(data.mass.gather(1, edges).diff(dim=1) > 0, (1, 0), value=True)
    filled = fresh.sum(1) - 1
    return torch.where(fresh, edges, n).sort(dim=1).values[:, : int(filled.max()) + 1], filled
