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

    def recovered(self, name: str) -> list[float] | None:
        """(ppl_ptq - ppl) / (ppl_ptq - ppl_fp) of every seed: 1 is full precision, 0 the best of rounding.

        None where there is nothing to recover, since rounding loses nothing.
        """
        if self.best is None:
            return None
        triples = list(zip(self.rounded[self.best], self.trained[name], self.full, strict=True))
        if any(rounded <= full for rounded, _, full in triples):
            return None
        return [(rounded - own) / (rounded - full) for rounded, own, full in triples]

    def wins(self, name: str) -> int:
        """In how many seeds the trained arm is better than every rounded one."""
        best = [min(values) for values in zip(*self.rounded.values(), strict=True)]
        return sum(own < other for own, other in zip(self.trained[name], best, strict=True))


def verdict(outcome: Outcome, name: str) -> str:
    """One sentence on one trained arm, whichever way it went."""
    best, seeds = outcome.best, len(outcome.full)
    if best is None:
        return f"{name} was compared with no post-training quantization."
    wins, recovered = outcome.wins(name), outcome.recovered(name)
    of_seeds = "with this seed" if seeds == 1 else f"in {wins} of {seeds} seeds"
    if recovered is None:
        return f"{best} loses nothing against full precision here: there is nothing for {name} to recover."
    share = f"{mean(recovered):.0%}" + (f" ({min(recovered):.0%} to {max(recovered):.0%})" if seeds > 1 else "")
    if wins == seeds:
        every = "every post-training quantization" if len(outcome.rounded) > 1 else best
        return f"{name} beats {every} {of_seeds}: it recovers {share} of what {best} loses."
    if wins:
        return f"{name} beats post-training quantization only {of_seeds}: it recovers {share} of what {best} loses."
    return f"{name} does NOT beat post-training quantization: against {best} it recovers {share}."


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
        share = "" if recovered is None else f"{mean(recovered):.0%}"
        table.add_row(shown, f"{mean(values):.2f}", spread(values), f"{ratio:.3f}", share)
    return table


def spread(values: list[float]) -> str:
    """Standard deviation over the seeds; empty where there is one."""
    return f"{stdev(values):.2f}" if len(values) > 1 else ""
