"""What the perplexities of all arms say: who won, by how much, and how sure that is."""

from statistics import mean, stdev
from typing import NamedTuple

from rich.table import Table

# Perplexities of every seed, in the order of the seeds.
Perplexities = dict[str, list[float]]


class Outcome(NamedTuple):
    """Perplexities by arm, each a list over the seeds.

    before: the model before any training.
    full: trained in full precision.
    rounded: post-training quantization of `full`, by name.
    trained: trained with quantization, by name.
    """

    before: list[float]
    full: list[float]
    rounded: Perplexities
    trained: Perplexities

    @property
    def best(self) -> str | None:
        """The post-training quantization with the least mean perplexity; None where there is none."""
        return min(self.rounded, key=lambda name: mean(self.rounded[name]), default=None)

    def recovered(self, name: str) -> float | None:
        """(ppl_ptq - ppl) / (ppl_ptq - ppl_fp) of the means over seeds: 1 is full precision, 0 the best of rounding.

        None where there is nothing to recover, since rounding loses nothing on the whole.
        """
        if self.best is None:
            return None
        return _share(mean(self.rounded[self.best]), mean(self.trained[name]), mean(self.full))

    def recovered_by_seed(self, name: str) -> list[float]:
        """The same of every seed in which the best rounding loses something."""
        if self.best is None:
            return []
        return recovered_by_seed(self.rounded[self.best], self.trained[name], self.full)

    def wins(self, name: str) -> int:
        """In how many seeds the trained arm is better than every rounded one."""
        best = [min(values) for values in zip(*self.rounded.values(), strict=True)]
        return sum(own < other for own, other in zip(self.trained[name], best, strict=True))


def recovered_by_seed(rounded: list[float], own: list[float], full: list[float]) -> list[float]:
    """(ppl_ptq - ppl) / (ppl_ptq - ppl_fp) of every seed in which rounding loses something."""
    triples = zip(rounded, own, full, strict=True)
    return [share for triple in triples if (share := _share(*triple)) is not None]


def _share(rounded: float, own: float, full: float) -> float | None:
    return None if rounded <= full else (rounded - own) / (rounded - full)


def verdict(outcome: Outcome, name: str) -> str:
    """One sentence on one trained arm, whichever way it went."""
    best, seeds = outcome.best, len(outcome.full)
    if best is None:
        return f"{name} was compared with no post-training quantization."
    wins = outcome.wins(name)
    of_seeds = "with this seed" if seeds == 1 else f"in {wins} of {seeds} seeds"
    every = "every post-training quantization" if len(outcome.rounded) > 1 else best
    if wins == seeds:
        who = f"{name} beats {every} {of_seeds}"
    elif wins:
        who = f"{name} beats {every} only {of_seeds}"
    else:
        who = f"{name} does NOT beat post-training quantization"
    return f"{who}: {_recovery(outcome, name, str(best))}."


def _recovery(outcome: Outcome, name: str, best: str) -> str:
    recovered, each = outcome.recovered(name), outcome.recovered_by_seed(name)
    if recovered is None:
        return f"{best} loses nothing against full precision here, so there is nothing to recover"
    spans = len(outcome.full) > 1 and len(each) == len(outcome.full)
    span = f" ({min(each):.0%} to {max(each):.0%})" if spans else ""
    return f"it recovers {recovered:.0%}{span} of what {best} loses"


def table_of(outcome: Outcome, title: str) -> Table:
    """Mean and spread of every arm."""
    table = Table(
        title=title, caption="±: standard deviation over the seeds. recovered: of what the best rounding loses."
    )
    table.add_column("arm")
    for heading in ("perplexity", "±", "of full precision", "recovered"):
        table.add_column(heading, justify="right")
    table.add_row("full precision, before training", f"{mean(outcome.before):.2f}")
    for name, values in {"full precision, trained": outcome.full, **outcome.rounded, **outcome.trained}.items():
        ratio = mean(own / full for own, full in zip(values, outcome.full, strict=True))
        recovered = outcome.recovered(name) if name in outcome.trained else None
        shown = name if name not in outcome.rounded else f"{name} of it"
        share = "" if recovered is None else f"{recovered:.0%}"
        table.add_row(shown, f"{mean(values):.2f}", spread(values), f"{ratio:.3f}", share)
    return table


def spread(values: list[float]) -> str:
    """Standard deviation over the seeds; empty where there is one."""
    return f"{stdev(values):.2f}" if len(values) > 1 else ""
