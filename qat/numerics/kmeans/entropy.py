"""Codebooks that use all codes equally often: then a code carries as much information as its bits can."""

import torch
from torch import Tensor

from qat.numerics.kmeans.moments import Moments, moments_of, with_ends


@torch.no_grad()
def equal_mass_1d(x: Tensor, entries: int) -> Tensor:
    """Entries whose nearest-value cells hold equally many values of each row of `x`.

    The cells are cut at the quantiles, and the means of the cells would be their best entries. But what counts is the
    nearest entry, so that the cut between two entries is their midpoint: the entries are the means, moved as little
    as possible (least squares) so that every midpoint is a quantile. Where that would put them out of order, as with
    many equal values, a row keeps the means.

    Args:
        x: `[rows, n]`, finite.
        entries: of each codebook.

    Returns:
        Entries `[rows, entries]` in float32, ascending.
    """
    data = moments_of(x)
    cuts = torch.arange(1, entries, device=x.device) * x.shape[1] // entries
    means = data.means(with_ends(cuts.expand(len(x), -1), x.shape[1]))
    correction = (_quantiles(data, cuts) - (means[:, 1:] + means[:, :-1]) / 2) @ _spread(entries, x.device)
    moved = means + correction.to(torch.float32)
    ascending = (moved.diff(dim=1) > 0).all(1, keepdim=True)
    return torch.where(ascending, moved, means)


def _quantiles(data: Moments, cuts: Tensor) -> Tensor:
    """Halfway between the values on both sides of each cut, `[rows, cuts]`."""
    below, above = (data.values[:, at] for at in ((cuts - 1).clamp(min=0), cuts))
    return (below + above) / 2


def _spread(entries: int, device: torch.device) -> Tensor:
    """Least change of the entries for given changes of their midpoints, `[entries - 1, entries]`: a pseudo-inverse."""
    midpoints = torch.zeros(entries - 1, entries)
    midpoints.diagonal().fill_(0.5)
    midpoints.diagonal(1).fill_(0.5)
    return torch.linalg.pinv(midpoints).T.to(device)
