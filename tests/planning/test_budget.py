"""The integer programme against brute force, and what it refuses."""

import itertools
import re

import numpy as np
import pytest

from qat.errors import InputError
from qat.planning import FUSED, Budget, lock_groups, pareto, solve

NAMES = ("int2", "int3", "int4", "int8")


def problem(layers=6, seed=0, spread=1.0):
    """Costs that fall and bits that grow with the candidate, as they do."""
    random = np.random.default_rng(seed)
    costs, bits, weights = {}, {}, {}
    for i in range(layers):
        own = np.sort(random.lognormal(0, spread, len(NAMES)))[::-1]
        weights[f"l.{i}"] = int(random.integers(1, 5)) * 64
        costs[f"l.{i}"] = dict(zip(NAMES, own.tolist(), strict=True))
        bits[f"l.{i}"] = {name: weights[f"l.{i}"] * int(name[3:]) + weights[f"l.{i}"] // 4 for name in NAMES}
    return costs, bits, weights


def brute_force(costs, spent, limit, groups):
    best = None
    for choice in itertools.product(*([n for n in NAMES if all(n in costs[x] for x in group)] for group in groups)):
        pairs = [(layer, name) for group, name in zip(groups, choice, strict=True) for layer in group]
        if sum(spent[layer][name] for layer, name in pairs) <= limit * (1 + 1e-12):
            cost = sum(costs[layer][name] for layer, name in pairs)
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("limit", [2.25, 2.4, 3.0, 3.25, 3.9, 5.1, 20.0])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("locked", [False, True])
def test_it_is_the_best_of_all_choices(limit, seed, locked):
    costs, bits, weights = problem(seed=seed, spread=3.0)
    spent = Budget(limit).spent(bits, weights)
    groups = [("l.0", "l.3"), ("l.1",), ("l.2", "l.4", "l.5")] if locked else [(layer,) for layer in costs]
    found = solve(costs, spent, limit, groups)
    assert found.cost == pytest.approx(brute_force(costs, spent, limit, groups), rel=1e-6)
    assert found.spent <= limit * (1 + 1e-9)
    assert found.spent == pytest.approx(
        sum(bits[x][name] for x, name in found.assignment.items()) / sum(weights.values())
    )
    assert all(len({found.assignment[layer] for layer in group}) == 1 for group in groups)


def test_small_costs_beside_large_ones_are_told_apart():
    """The optimum lies nine orders of magnitude below the largest cost."""
    costs, bits, weights = problem()
    costs = {layer: own | {"int2": 1e6} for layer, own in costs.items()}
    costs = {layer: {n: c * (1e-3 if n != "int2" else 1) for n, c in own.items()} for layer, own in costs.items()}
    spent = Budget(4.0).spent(bits, weights)
    groups = [(layer,) for layer in costs]
    assert solve(costs, spent, 4.0).cost == pytest.approx(brute_force(costs, spent, 4.0, groups), rel=1e-6)


def test_a_budget_that_one_choice_meets_exactly_is_met():
    costs, bits, weights = problem()
    for name, limit in zip(NAMES, (2.25, 3.25, 4.25, 8.25), strict=True):
        uniform = sum(own[name] for own in costs.values())
        assert solve(costs, Budget(limit).spent(bits, weights), limit).cost <= uniform * (1 + 1e-9)


def test_budgets_in_bytes_and_milliseconds():
    costs, bits, weights = problem()
    total = sum(weights.values())
    by_bits = solve(costs, Budget(3.5).spent(bits, weights), 3.5)
    limit = 3.5 * total / 8
    assert solve(costs, Budget(limit, "bytes").spent(bits, weights), limit).assignment == by_bits.assignment
    ms = {name: int(name[3:]) / 100 for name in NAMES}
    per_layer = Budget(0.2, "ms", ms, per="layer").spent(bits, weights)
    assert per_layer["l.0"]["int4"] == 0.04
    found = solve(costs, per_layer, 0.2)
    assert found.cost == pytest.approx(brute_force(costs, per_layer, 0.2, [(layer,) for layer in costs]))
    per_weight = Budget(1.0, "ms", ms).spent(bits, weights)
    assert per_weight["l.0"]["int4"] == pytest.approx(0.04 * weights["l.0"])


def test_the_curve_falls_and_ends_where_nothing_helps():
    costs, bits, weights = problem()
    curve = pareto(costs, Budget(3).spent(bits, weights), points=9)
    assert [s.cost for s in curve] == sorted((s.cost for s in curve), reverse=True)
    assert set(curve[0].assignment.values()) == {"int2"}
    assert set(curve[-1].assignment.values()) == {"int8"}


def test_a_large_model_takes_no_time():
    costs, bits, weights = problem(layers=560, spread=2.0)
    spent = Budget(3.5).spent(bits, weights)
    found = solve(costs, spent, 3.5)
    assert 3.49 < found.spent <= 3.5


def test_what_cannot_be_met_is_refused():
    costs, bits, weights = problem()
    spent = Budget(3).spent(bits, weights)
    with pytest.raises(InputError, match=re.escape("budget of 2 is below the least that these layers can spend, 2.25")):
        solve(costs, spent, 2.0)
    narrow = costs | {"l.0": {"int2": 1.0}, "l.1": {"int8": 0.1}}
    with pytest.raises(
        InputError,
        match=re.escape("l.0, l.1 are locked to one candidate and have none in common (l.0: int2; l.1: int8)"),
    ):
        solve(narrow, spent, 9.0, [("l.0", "l.1"), *((f"l.{i}",) for i in range(2, 6))])
    with pytest.raises(InputError, match=r"The cost of l\.2 as int3 is nan"):
        solve(costs | {"l.2": costs["l.2"] | {"int3": float("nan")}}, spent, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "it is a positive number"),
        ({"limit": 3, "unit": "byte"}, "Did you mean 'bytes'"),
        ({"limit": 3, "unit": "ms"}, "needs a table"),
        ({"limit": 3, "ms": {"int4": 1}}, "needs a table"),
        ({"limit": "small"}, "The budget is small.*a positive number"),
        ({"limit": 3, "unit": "ms", "ms": {}, "per": "token"}, "per weight or per layer"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Budget(**arguments)


def test_a_candidate_without_a_time_is_refused():
    _, bits, weights = problem()
    for ms in ({"int4": 1.0}, {"int2": "fast", "int4": 1.0}):
        with pytest.raises(InputError, match="no number for 'int2'"):
            Budget(1, "ms", ms).spent(bits, weights)


LAYERS = [
    f"b.{i}.{name}"
    for i in range(2)
    for name in ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "gate_proj", "up_proj")
]


def test_what_engines_fuse_is_locked():
    groups = lock_groups(LAYERS)
    assert ("b.1.a.q_proj", "b.1.a.k_proj", "b.1.a.v_proj") in groups
    assert ("b.0.gate_proj", "b.0.up_proj") in groups
    assert ("b.0.a.o_proj",) in groups
    assert sorted(layer for group in groups for layer in group) == sorted(LAYERS)
    assert len(groups) == 6


def test_layers_are_locked_by_name_too_and_locks_join():
    groups = lock_groups(LAYERS, [*FUSED, ("b.0.a.q_proj", "b.1.gate_proj")])
    joined = next(group for group in groups if "b.0.a.q_proj" in group)
    assert set(joined) == {"b.0.a.q_proj", "b.0.a.k_proj", "b.0.a.v_proj", "b.1.gate_proj", "b.1.up_proj"}
    assert lock_groups(LAYERS, []) == [(layer,) for layer in LAYERS]
    with pytest.raises(InputError, match=r"there is no layer 'b\.0\.q_proj'"):
        lock_groups(LAYERS, [("b.0.q_proj", "b.1.gate_proj")])
