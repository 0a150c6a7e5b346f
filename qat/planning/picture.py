"""A plan as a picture: the bits of every layer, and what other budgets would have bought."""

import math
import re
from pathlib import Path
from typing import Any

from qat.atomic import replaced_file
from qat.planning.plan import Plan

_UNITS = {"kl": "nats a token", "fisher": "nats a token", "gradient": "nats a token", "hutchinson": "nats a token"}


def draw(plan: Plan, path: str | Path, title: str) -> Path:
    """Write a png: a heat map of bits per weight, kind of layer x depth, and the Pareto curve of cost over budget.

    Returns:
        `path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = len({_place(layer)[0] for layer in plan.assignment})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, max(3.6, 1.6 + 0.36 * rows)), width_ratios=(1.7, 1), constrained_layout=True
    )
    figure.suptitle(f"{title}: {plan.bits_per_weight:.3f} bits per weight, by {plan.signal}")
    _heat_map(plan, left)
    _curve(plan, right)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    return Path(path)


def _place(layer: str) -> tuple[str, int]:
    """The kind of a layer, its name without what repeats, and its depth: the first number in it."""
    number = re.search(r"\.(\d+)\.", layer)
    return (layer[number.end() :], int(number.group(1))) if number else (layer, 0)


def _heat_map(plan: Plan, axis: Any) -> None:
    """A cell for each layer, coloured by its candidate, which it is labelled with where there is room."""
    import numpy as np
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    order = _by_bits(plan)
    kinds = list(dict.fromkeys(_place(layer)[0] for layer in plan.assignment))
    depths = 1 + max(_place(layer)[1] for layer in plan.assignment)
    cells = np.full((len(kinds), depths), np.nan)
    for layer, candidate in plan.assignment.items():
        kind, depth = _place(layer)
        cells[kinds.index(kind), depth] = list(order).index(candidate)
    colours = list(order.values())
    norm = BoundaryNorm(np.arange(len(order) + 1) - 0.5, len(order))
    axis.imshow(cells, aspect="auto", cmap=ListedColormap(colours), norm=norm)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set(xlabel="block")
    axis.set_xticks(range(0, depths, max(1, math.ceil(depths / 16))))
    axis.set_xticks(np.arange(depths + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(kinds) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    counts = {name: sum(own == name for own in plan.assignment.values()) for name in order}
    handles = [Patch(color=c, label=f"{name} ({counts[name]})") for c, name in zip(colours, order, strict=True)]
    axis.legend(
        handles=handles, ncols=len(handles), fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )


def _by_bits(plan: Plan) -> dict[str, Any]:
    """The candidates that were chosen and their colours, fewest bits per weight first: light for few, dark for many.

    Colours follow from all candidates, so that plans of different budgets share them.
    """
    import matplotlib

    layer = next(iter(plan.bits))
    order = sorted(plan.candidates, key=lambda name: (plan.bits[layer][name], name))
    shades = {name: 0.05 + 0.9 * i / max(1, len(order) - 1) for i, name in enumerate(order)}
    chosen = set(plan.assignment.values())
    return {name: matplotlib.colormaps["viridis_r"](shades[name]) for name in order if name in chosen}


def _curve(plan: Plan, axis: Any) -> None:
    """Predicted cost over what is spent, of the best choice for each budget, of this plan, and of uniform choices."""
    points = [(s.spent, s.cost) for s in plan.curve if s.cost > 0]
    if points:
        axis.plot(*zip(*points, strict=True), color="tab:blue", marker=".", label="best for each budget")
    uniform = {name: s for name, s in plan.uniform().items() if s.cost > 0 and plan.candidates[name].quantizes}
    if uniform:
        axis.plot(
            [s.spent for s in uniform.values()], [s.cost for s in uniform.values()],
            "x", color="tab:gray", label="the same for all layers",
        )  # fmt: skip
    for name, solution in uniform.items():
        place = (solution.spent, solution.cost)
        axis.annotate(name, place, (5, 4), textcoords="offset points", fontsize=8, color="gray")
    spent = sum(plan.spent[layer][name] for layer, name in plan.assignment.items())
    axis.plot([spent], [plan.cost], "*", markersize=15, color="tab:red", label="this plan")
    axis.set(xlabel=plan.budget.unit, ylabel=f"predicted cost ({_UNITS.get(plan.signal, plan.signal)})", yscale="log")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
