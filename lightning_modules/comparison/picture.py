"""All arms of a comparison in one picture."""

from pathlib import Path

from lightning_modules.comparison.outcome import Outcome
from qat.atomic import replaced_file


def draw(outcome: Outcome, path: Path, title: str) -> Path:
    """A row of dots for every arm, one for each seed, and a bar at their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [("full precision", outcome.full, "black")]
    rows += [(f"{name} of it", values, "tab:orange") for name, values in outcome.rounded.items()]
    rows += [(name, values, "tab:blue") for name, values in outcome.trained.items()]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.45 * len(rows)), constrained_layout=True)
    for height, (_, values, colour) in enumerate(rows):
        axis.plot(values, [height] * len(values), "o", color=colour, alpha=0.6)
        axis.plot(sum(values) / len(values), height, "|", color=colour, markersize=18, markeredgewidth=2)
    axis.axvline(sum(outcome.full) / len(outcome.full), color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axis.invert_yaxis()
    axis.set(xlabel="perplexity, lower is better: a dot for each seed, a bar at the mean", title=title)
    values = [value for _, own, _ in rows for value in own]
    if max(values) > 10 * min(values):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    return path
