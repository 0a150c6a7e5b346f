"""Many clusters: the optimum of a row cut into bins, by a price for each cluster.

Every cluster more lowers the least error by less than the one before. So there is a price at which the cheapest
partition, its error and the price of all its clusters together, has as many clusters as are wanted; and for a given
price one pass over the bins finds that partition, whatever the number of its clusters:

    least[j] = price + min over i < j of least[i] + cost(i, j)

(Finding a minimum-weight k-link path in graphs with the concave Monge property, Aggarwal, Schieber and Tokuyama 1994;
for k-means arXiv 1701.07204.) What is left is to search the price. With 8 bins a cluster, a cluster spans few of all
bins, so that i is looked for only a little way back; rows whose clusters reach that far are searched again, further.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qat.numerics.kmeans.bins import Bins, bins_of, claimed
from qat.numerics.kmeans.moments import Moments

_BINS_A_CLUSTER = 8
# How far back to look, in bins of the mean cluster. The fullest cluster of a normal row has 1.7 times the mean mass.
_REACH = 3
# Prices to try at most. A few clusters may be missing then; Lloyd's algorithm puts them where the error is largest.
_PRICES = 12
# Costs held at once: 64 MiB, or 1 GiB.
_COSTS_ON_CPU, _COSTS_ON_GPU = 2**24, 2**28


def optimum(data: Moments, clusters: int) -> Tensor:
    """Edges `[rows, clusters + 1]` of the intervals with the least squared error; the first of them may be empty.

    Rows of up to 8 values a cluster are searched value by value, others in as many bins.
    """
    edges, bins = bins_of(data, _BINS_A_CLUSTER * clusters)
    return edges.gather(1, _cheapest(bins, clusters, _REACH * math.ceil(len(bins.mass) / clusters)))


def _cheapest(bins: Bins, clusters: int, reach: int) -> Tensor:
    """At which bins the cells of each row begin, and its end, `[rows, clusters + 1]`; the first cells may be empty.

    Args:
        bins: of the rows.
        clusters: number of cells.
        reach: of how many bins a cell may consist.
    """
    size, rows = bins.mass.shape
    reach = min(reach, size)
    most = _COSTS_ON_CPU if bins.mass.device.type == "cpu" else _COSTS_ON_GPU
    step = max(1, most // (size * reach))
    found = torch.cat(
        [_search(bins.rows(slice(begin, begin + step)), clusters, reach) for begin in range(0, rows, step)]
    )
    limited = (found.diff(dim=1) == reach).any(1)
    if reach < size and limited.any():
        found[limited] = _cheapest(bins.rows(limited), clusters, 2 * reach)
    return found


def _search(bins: Bins, clusters: int, reach: int) -> Tensor:
    """As `_cheapest`: try prices, and keep the partition that has the most cells but not too many."""
    costs = _costs(bins, reach)
    best, most = pad(bins.filled[:, None], (clusters, 0)), torch.ones_like(bins.filled)
    wanted = bins.filled.clamp(max=clusters)
    bracket = Bracket.around(bins)
    price = _first_price(bins, clusters)
    for attempt in range(_PRICES):
        path, cells = _way_back(costs, _least(costs, price.exp()), bins.filled, clusters)
        better = (cells <= clusters) & (cells > most)
        best, most = torch.where(better[:, None], path, best), torch.where(better, cells, most)
        if torch.equal(most, wanted):
            break
        bracket = bracket.narrowed(price, cells, clusters)
        price = bracket.next_price(price, cells, clusters, attempt)
    return best


class Bracket(NamedTuple):
    """Logarithms of two prices for each row, with how many cells they give: too low a price, and one that is not.

    All are `[rows]` float32.
    """

    low: Tensor
    cells_at_low: Tensor
    high: Tensor
    cells_at_high: Tensor

    @classmethod
    def around(cls, bins: Bins) -> "Bracket":
        """Any price: for nothing every bin is a cell, and for infinitely much all are one."""
        infinite = torch.full(bins.filled.shape, torch.inf, device=bins.filled.device)
        return cls(-infinite, bins.filled.to(torch.float32), infinite, torch.ones_like(infinite))

    def narrowed(self, price: Tensor, cells: Tensor, clusters: int) -> "Bracket":
        """With `price` in the place of one of the two, where it lies between them."""
        too_low = (cells > clusters) & (price > self.low)
        high_enough = (cells <= clusters) & (price < self.high)
        return Bracket(
            torch.where(too_low, price, self.low),
            torch.where(too_low, cells, self.cells_at_low),
            torch.where(high_enough, price, self.high),
            torch.where(high_enough, cells, self.cells_at_high),
        )

    def next_price(self, price: Tensor, cells: Tensor, clusters: int, attempt: int) -> Tensor:
        """Interpolate between two known prices; from one alone, go by the law of `_first_price`, and ever further."""
        wanted = math.log(clusters)
        there, here = self.cells_at_low.log(), self.cells_at_high.log()
        part = ((there - wanted) / (there - here)).clamp(0.1, 0.9)
        beyond = price + 3 * 2**attempt * (cells.log() - wanted)
        return torch.where((self.high - self.low).isfinite(), torch.lerp(self.low, self.high, part), beyond)


def _first_price(bins: Bins, clusters: int) -> Tensor:
    """Logarithm of the price of each row if cells were narrow, `[rows]` float32; -inf where every bin can be a cell.

    The least error is then c / clusters^2 with c = (sum of the claims)^3 / 12 (Panter and Dite), and one cluster more
    is worth 2 c / clusters^3.
    """
    widths = pad(bins.mean.diff(dim=0).abs(), (0, 0, 1, 0))
    total = claimed(bins.mass, widths, len(widths), dim=0).sum(0)
    price = (total.pow(3) / (6 * clusters**3)).log().clamp(min=math.log(torch.finfo(torch.float32).tiny))
    return price.to(torch.float32).masked_fill(bins.filled <= clusters, -torch.inf)


def _costs(bins: Bins, reach: int) -> Tensor:
    """`[bins, reach, rows]` float32: at [j, i] the squared error of one cell of the bins j - reach + 1 + i ... j.

    Every bin counts as its mean: what it spreads inside is the same for all choices. Infinite where there is no such
    cell. Cells grow bin by bin, which loses no digits to the difference of large sums.
    """
    size, rows = bins.mass.shape
    costs = torch.full((size, reach, rows), torch.inf, device=bins.mass.device)
    mass, mean, error = bins.mass, bins.mean, torch.zeros_like(bins.mean)
    for length in range(reach):
        costs[length:, reach - 1 - length] = error
        added = bins.mass[length + 1 :]
        mass, mean, error = mass[: len(added)], mean[: len(added)], error[: len(added)]
        apart = bins.mean[length + 1 :] - mean
        share = added / (mass + added).clamp(min=torch.finfo(torch.float64).tiny)
        error = error + apart.square() * mass * share
        mean = mean + apart * share
        mass = mass + added
    return costs


def _least(costs: Tensor, price: Tensor) -> Tensor:
    """Least error and price of the bins before j: `[reach + bins, rows]`, where row reach - 1 is j = 0.

    Args:
        costs: see `_costs`.
        price: of a cell, `[rows]`.
    """
    size, reach, rows = costs.shape
    least = torch.full((reach + size, rows), torch.inf, device=costs.device)
    least[reach - 1] = 0
    sums = torch.empty(reach, rows, device=costs.device)
    for j in range(size):
        torch.add(costs[j], least[j : j + reach], out=sums)
        torch.add(sums.amin(0), price, out=least[j + reach])
    return least


def _way_back(costs: Tensor, least: Tensor, count: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Where the cells of the least error and price begin, and how many they are.

    Returns:
        The last `clusters` cells, as `_cheapest`, and the number of cells of each row, counted up to twice `clusters`.
    """
    size, reach, rows = costs.shape
    back, flat = torch.arange(reach, device=costs.device)[:, None], costs.view(size * reach, rows)
    path = torch.zeros(clusters + 1, rows, dtype=torch.int64, device=costs.device)
    path[clusters] = at = count
    cells = torch.zeros_like(count)
    for step in range(1, 2 * clusters + 1):
        last = (at - 1).clamp(min=0)
        total = flat.gather(0, last * reach + back) + least.gather(0, last + back)
        # Along contiguous memory, because torch's argmin is ten times slower along the other.
        begin = total.T.contiguous().argmin(1) + last - reach + 1
        cells = cells + (at > 0)
        at = torch.where(at > 0, begin, 0)
        if step <= clusters:
            path[clusters - step] = at
        if not at.any():
            break
    return path.T, cells
