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

    def recovered(self, name: str) -> "Recovered":
        """What the trained arm recovers of what the best rounding loses; nothing where none was rounded."""
        return Recovered([]) if self.best is None else recovered(self.rounded[self.best], self.trained[name], self.full)

    def wins(self, name: str) -> int:
        """In how many seeds the trained arm is better than every rounded one."""
        best = [min(values) for values in zip(*self.rounded.values(), strict=True)]
        return sum(own < other for own, other in zip(self.trained[name], best, strict=True))


class Recovered(NamedTuple):
    """The share of what rounding loses that training recovers: 1 is full precision, 0 is rounding, less is worse.

    by_seed: of every seed in which rounding loses something.
    """

    by_seed: list[float]

    @property
    def mean(self) -> float | None:
        """None where there is nothing to recover, since rounding loses nothing in any seed."""
        return mean(self.by_seed) if self.by_seed else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of fewer than two."""
        return stdev(self.by_seed) if len(self.by_seed) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return ""
        return f"{self.mean:.0%}" + ("" if self.spread is None else f" ± {self.spread:.0%}")


def recovered(rounded: list[float], own: list[float], full: list[float]) -> Recovered:
    """r_s = (ppl_ptq,s - ppl_s) / (ppl_ptq,s - ppl_fp,s) of each seed s, of which mean and spread are reported.

    Not the share of the mean perplexities: the arms of one seed saw the same text in the same order, so what a seed
    makes easy or hard for all of them cancels within its share, and the spread is that of the very figure that is
    reported. Seeds in which rounding loses nothing have no share and are left out.
    """
    seeds = zip(rounded, own, full, strict=True)
    return Recovered([(ptq - ppl) / (ptq - fp) for ptq, ppl, fp in seeds if ptq > fp])


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
    found, seeds = outcome.recovered(name), len(outcome.full)
    if found.mean is None:
        return f"{best} loses nothing against full precision here, so there is nothing to recover"
    some = len(found.by_seed) < seeds
    where = f" in the {len(found.by_seed)} of {seeds} seeds where it loses anything" if some else ""
    return f"it recovers {found} of what {best} loses{where}"


def table_of(outcome: Outcome, title: str) -> Table:
    """Mean and spread of every arm."""
    table = Table(
        title=title,
        caption="±: standard deviation over the seeds. recovered: of what the best rounding loses, by seed.",
    )
    table.add_column("arm")
    for heading in ("perplexity", "±", "of full precision", "recovered"):
        table.add_column(heading, justify="right")
    table.add_row("full precision, before training", f"{mean(outcome.before):.2f}")
    for name, values in {"full precision, trained": outcome.full, **outcome.rounded, **outcome.trained}.items():
        ratio = mean(own / full for own, full in zip(values, outcome.full, strict=True))
        shown = name if name not in outcome.rounded else f"{name} of it"
        share = str(outcome.recovered(name)) if name in outcome.trained else ""
        table.add_row(shown, f"{mean(values):.2f}", spread(values), f"{ratio:.3f}", share)
    return table


def spread(values: list[float]) -> str:
    """Standard deviation over the seeds; empty where there is one."""
    return f"{stdev(values):.2f}" if len(values) > 1 else ""
