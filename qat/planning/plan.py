"""A plan: how many bits each layer gets, and why."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from qat.atomic import replaced_file
from qat.errors import InputError, nearest
from qat.planning.budget import Assignment, Budget, Solution, pareto, solve
from qat.planning.candidates import Candidates, Table, integers, planned_layers, storage
from qat.planning.locks import FUSED, lock_groups
from qat.planning.sensitivity import sensitivity
from qat.transforms.layers import plain_layers


@dataclass(frozen=True)
class Plan:
    """A candidate for every layer, and what it was chosen from.

    Attributes:
        assignment: the candidate of each layer by name.
        others: layers that hold weights and are not planned: they stay in full precision.
        costs: `[layer][candidate]`, of what each layer may get.
        bits: `[layer][candidate]`, stored.
        weights: of each layer.
        spent: `[layer][candidate]`, in the unit of the budget.
        groups: layers that get the same candidate.
    """

    assignment: Assignment
    others: tuple[str, ...]
    candidates: Candidates
    costs: Table
    bits: Mapping[str, Mapping[str, int]]
    weights: Mapping[str, int]
    spent: Mapping[str, Mapping[str, float]]
    groups: Sequence[Sequence[str]]
    budget: Budget
    signal: str
    rounding: str = "nearest"

    @property
    def cost(self) -> float:
        """The predicted cost: nats a token for signals that say so."""
        return sum(self.costs[layer][name] for layer, name in self.assignment.items())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, of the planned layers."""
        return sum(self.bits[layer][name] for layer, name in self.assignment.items()) / sum(self.weights.values())

    @cached_property
    def curve(self) -> list[Solution]:
        """The best choice for each of a range of budgets, among them this one and those of uniform choices."""
        also = [self.budget.limit, *(solution.spent for solution in self.uniform().values())]
        return pareto(self.costs, self.spent, self.groups, also=also)

    def uniform(self) -> dict[str, Solution]:
        """Every candidate that all layers may get, given to all of them."""
        names = [name for name in self.candidates if all(name in own for own in self.costs.values())]
        return {
            name: Solution(
                dict.fromkeys(self.costs, name),
                sum(own[name] for own in self.costs.values()),
                sum(own[name] for own in self.spent.values()),
            )
            for name in names
        }

    def save(self, path: str | Path) -> None:
        """Write all numbers as JSON."""
        layers = {
            layer: {"candidate": name, "weights": self.weights[layer], "bits": self.bits[layer], "costs": own}
            for (layer, name), own in zip(self.assignment.items(), self.costs.values(), strict=True)
        }
        content = {
            "signal": self.signal,
            "rounding": self.rounding,
            "budget": {"limit": self.budget.limit, "unit": self.budget.unit},
            "bits_per_weight": self.bits_per_weight,
            "cost": self.cost,
            "groups": [list(group) for group in self.groups if len(group) > 1],
            "layers": layers,
        }
        with replaced_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    budget: Budget,
    candidates: Candidates | None = None,
    signal: str = "kl",
    fused: Iterable[Sequence[str]] = FUSED,
    allow: Mapping[str, str | Sequence[str]] | None = None,
    exclude: str | Sequence[str] = (),
    folder: str | Path | None = None,
    rounding: str = "nearest",
) -> Plan:
    """Choose a candidate for every layer of `model` such that the predicted cost is least within `budget`.

    Args:
        model: in full precision; it stays so.
        batches: mappings of `input_ids` and what else the model takes; see `sensitivity`.
        candidates: by name. Default: `integers()`, 2 to 8 bits in groups of 64.
        signal: what costs are: see `sensitivity`.
        fused: layers that get the same candidate; see `lock_groups`.
        allow: the candidates that layers may get, by their names with shell wildcards; the first pattern that matches
            holds. A layer that is to stay in 8-bit floats: `{"*.down_proj": "fp8"}`.
        exclude: layers, with shell wildcards, that stay in full precision and count in no budget.
        folder: where rows of the sensitivity are kept.
        rounding: how weights will be rounded: see `sensitivity`.

    Raises:
        InputError: see `planned_layers`, `sensitivity` and `solve`; or a pattern of `allow` is of no use.
    """
    candidates = integers() if candidates is None else candidates
    if not candidates:
        raise InputError("There are no candidates: give at least one, such as int4.")
    layers = planned_layers(model, exclude)
    bits, weights = storage(layers, candidates), {name: layer.weights for name, layer in layers.items()}
    groups, allowed = lock_groups(layers, fused), _allowed(layers, candidates, allow or {})
    spent = budget.spent(bits, weights)
    # Refused before the work: what no cost can mend.
    solve(_only({layer: dict.fromkeys(candidates, 0.0) for layer in layers}, allowed), spent, budget.limit, groups)
    costs = _only(sensitivity(model, batches, layers, candidates, signal, folder, rounding), allowed)
    assignment = solve(costs, spent, budget.limit, groups).assignment
    others = _others(model, layers)
    return Plan(assignment, others, candidates, costs, bits, weights, spent, groups, budget, signal, rounding)


def _only(table: Table, allowed: Mapping[str, Sequence[str]]) -> Table:
    return {layer: {name: own[name] for name in allowed[layer]} for layer, own in table.items()}


def _allowed(
    layers: Iterable[str], candidates: Candidates, allow: Mapping[str, str | Sequence[str]]
) -> dict[str, list[str]]:
    """The candidates that each layer may get."""
    patterns = {pattern: [names] if isinstance(names, str) else list(names) for pattern, names in allow.items()}
    for pattern, names in patterns.items():
        for name in names:
            if name not in candidates:
                raise InputError(f"allow '{pattern}' names '{name}', which is no candidate.{nearest(name, candidates)}")
    used: set[str] = set()
    found = {}
    for layer in layers:
        matching = next((pattern for pattern in patterns if fnmatchcase(layer, pattern)), None)
        found[layer] = list(candidates) if matching is None else patterns[matching]
        used |= {matching} if matching is not None else set()
    for pattern in patterns:
        if pattern not in used:
            raise InputError(f"allow '{pattern}' is of no use: it matches no layer, or earlier patterns take them all.")
    return found


def _others(model: nn.Module, layers: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in plain_layers(model) if name not in layers)
