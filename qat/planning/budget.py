"""Choosing one candidate for every layer within a budget, as an integer programme."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qat.errors import InputError, nearest
from qat.planning.locks import common

UNITS = ("bits per weight", "bytes", "ms")
# Of HiGHS: how far it may step over a constraint, relative to it.
_TOLERANCE = 1e-6
_GAP = 1e-7
_SLACK = 1e-9
Assignment = dict[str, str]
Numbers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Budget:
    """How much all layers may spend together.

    Args:
        limit: of `unit`.
        unit: `bits per weight`, scales, zero points and codebooks counted; `bytes`; or `ms`, milliseconds.
        ms: of each candidate by name, for `unit="ms"`: a measured time, for a weight or for a layer as `per` says.
        per: `weight` or `layer`.

    Raises:
        InputError: if the limit is not positive, there is no such unit, or `ms` and `unit` do not go together.
    """

    limit: float
    unit: str = "bits per weight"
    ms: Mapping[str, float] | None = None
    per: str = "weight"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InputError(f"There is no unit '{self.unit}' of a budget.{nearest(self.unit, UNITS)}")
        if not isinstance(self.limit, int | float) or not self.limit > 0:
            raise InputError(f"The budget is {self.limit} {self.unit}: it is a positive number, such as 3.5.")
        if (self.unit == "ms") != (self.ms is not None):
            raise InputError("A budget in ms needs a table of milliseconds by candidate (ms), and only that one does.")
        if self.per not in ("weight", "layer"):
            raise InputError(f"Milliseconds are per weight or per layer, not per '{self.per}'.")

    def spent(self, bits: Numbers, weights: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """What each layer spends as each candidate, `[layer][candidate]`, such that their sum is in `unit`."""
        total = sum(weights.values())
        return {
            layer: {name: self._amount(name, b, weights[layer], total) for name, b in own.items()}
            for layer, own in bits.items()
        }

    def _amount(self, name: str, bits: float, weights: int, total: int) -> float:
        if self.unit == "bytes":
            return bits / 8
        if self.ms is None:
            return bits / total
        if not isinstance(self.ms.get(name), int | float):
            raise InputError(f"The table of milliseconds has no number for '{name}': measure it, or drop it.")
        return self.ms[name] * (weights if self.per == "weight" else 1)


class Solution(NamedTuple):
    """A candidate for every layer, what they cost together, and what they spend."""

    assignment: Assignment
    cost: float
    spent: float


def solve(costs: Numbers, spent: Numbers, limit: float, groups: Sequence[Sequence[str]] | None = None) -> Solution:
    """Minimise the sum of costs under sum of spent <= limit, one candidate for each group (HAWQ-V3, arXiv 2011.10680).

    The layers' costs add up, as in a second-order expansion without terms of two layers. Solved to optimality by
    HiGHS.

    Args:
        costs: `[layer][candidate]`; a layer may get the candidates that are listed for it.
        spent: `[layer][candidate]`, in the unit of `limit`.
        limit: the budget.
        groups: layers that get the same candidate, each layer in one group. Default: each on its own.

    Raises:
        InputError: if the limit is below the least that the layers can spend, layers of a group have no candidate in
            common, or a cost is NaN or infinite.
    """
    _refuse_nan(costs)
    variables = _variables(costs, spent, groups or [(layer,) for layer in costs])
    least = sum(min(v.spent for v in own) for own in variables)
    if least > limit * (1 + _SLACK):
        raise InputError(
            f"The budget of {limit:g} is below the least that these layers can spend, {least:g}: raise it, or give "
            "smaller candidates."
        )
    chosen = _chosen(variables, limit)
    assignment = {layer: v.candidate for v in chosen for layer in v.group}
    ordered = {layer: assignment[layer] for layer in costs}
    return Solution(ordered, sum(v.cost for v in chosen), sum(v.spent for v in chosen))


def pareto(
    costs: Numbers,
    spent: Numbers,
    groups: Sequence[Sequence[str]] | None = None,
    points: int = 24,
    also: Iterable[float] = (),
) -> list[Solution]:
    """The best solution of each of `points` budgets, from the least that can be spent to the most that helps.

    Args:
        also: further budgets, of which those in between are solved too.
    """
    variables = _variables(costs, spent, groups or [(layer,) for layer in costs])
    least = sum(min(v.spent for v in own) for own in variables)
    best = sum(min(own, key=lambda v: (v.cost, v.spent)).spent for own in variables)
    limits = sorted({*np.linspace(least, best, points).tolist(), *(limit for limit in also if least < limit < best)})
    return [solve(costs, spent, limit, groups) for limit in limits]


class _Variable(NamedTuple):
    """Whether a group gets a candidate, and what all its layers then cost and spend."""

    group: Sequence[str]
    candidate: str
    cost: float
    spent: float


def _variables(costs: Numbers, spent: Numbers, groups: Sequence[Sequence[str]]) -> list[list[_Variable]]:
    """The choices of each group."""

    def together(group: Sequence[str], table: Numbers, name: str) -> float:
        return sum(table[layer][name] for layer in group)

    return [
        [_Variable(group, n, together(group, costs, n), together(group, spent, n)) for n in common(group, costs)]
        for group in groups
    ]


def _chosen(variables: list[list[_Variable]], limit: float) -> list[_Variable]:
    """The optimum, which HiGHS may not step over the limit for."""
    bound, scale = limit, max(max(abs(v.cost) for v in own) for own in variables)
    for _ in range(4):
        chosen = _programme(variables, bound, scale)
        cost, used = sum(v.cost for v in chosen), sum(v.spent for v in chosen)
        if used > limit * (1 + _SLACK):
            bound = max(limit * (1 - 2 * _TOLERANCE), sum(min(v.spent for v in own) for own in variables))
        elif scale > 2 * abs(cost) > 0:
            # Its gap is absolute: where the optimum is far below the largest cost, it is found at the scale of its own.
            scale = abs(cost)
        else:
            break
    return chosen


def _programme(variables: list[list[_Variable]], limit: float, scale: float) -> list[_Variable]:
    flat = [v for own in variables for v in own]
    owner = np.repeat(np.arange(len(variables)), [len(own) for own in variables])
    one_each = (np.arange(len(variables))[:, None] == owner).astype(float)
    result = milp(
        np.array([v.cost for v in flat]) / (scale or 1.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([[v.spent / limit for v in flat]]), -np.inf, 1),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": 60.0},
    )
    if result.x is None:
        raise InputError(f"No choice within the budget of {limit:g} was found: {result.message}")
    return [flat[index] for index in np.flatnonzero(result.x > 0.5)]


def _refuse_nan(costs: Numbers) -> None:
    for layer, own in costs.items():
        for name, cost in own.items():
            if not np.isfinite(cost):
                raise InputError(f"The cost of {layer} as {name} is {cost}: look at the layer's weights and inputs.")
