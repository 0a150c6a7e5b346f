"""Mixed precision beside the same bits everywhere and beside chance: perplexity at the same number of stored bits.

    python -m benchmarks.mixed --texts TEXTS                         by the Fisher diagonal, rounded; results/mixed.json
    python -m benchmarks.mixed --texts TEXTS --signals kl fisher --methods rtn gptq --windows 0
    python -m benchmarks.mixed --texts TEXTS --signals kfac --roundings nearest gptq --methods rtn gptq --windows 0

TEXTS as in benchmarks/grids.py; a run that stopped goes on. The model is benchmarks/recipe.py's, all its linear layers
but the head are quantized, weights only, with LSQ's least-squares scales. A row for each budget (bits per weight,
scales counted), signal, rounding whose errors the plan weighs, and method that rounds: `ppl_uniform`, 3-bit integers in
groups of 64 or 32, which spend exactly the budget; `ppl_larger`, 5-bit integers, which spend more; `ppl_random`, the
geometric mean over layers' bits drawn at random until the budget is spent; `ppl_mixed`, the plan. Plans and draws
choose from 2 to 8 bits in groups of 64, and give queries, keys and values, and gate and up, the same.
"""

import argparse
import hashlib
import random
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import qat
from benchmarks.recipe import LENGTH, MODEL, device, load, perplexity
from benchmarks.record import kept, record
from benchmarks.texts import calibration, windows
from qat.export.artifact import bits_per_weight
from qat.planning import (
    ROUNDINGS,
    SIGNALS,
    Budget,
    Candidate,
    Plan,
    integers,
    lock_groups,
    plan,
    planned_layers,
    storage,
)
from qat.quantizers import LSQQuantizer
from qat.transforms import Rule, discard, gptq

UNIFORM = {3.25: ("int3-g64", 64), 3.5: ("int3-g32", 32)}
# Uniform bits of which the smallest budget saves two fifths, as is claimed of mixed precision.
LARGER = ("int5-g64", 5.25, qat.Scheme(weight=partial(LSQQuantizer, bits=5, granularity="per_group_64")))
CALIBRATION = 128
# Windows of a batch: many small batches serve gradients of weights, few large ones all that goes by tokens.
BATCHES = {"kl": 16, "kfac": 8}
Batches = list[dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--work", type=Path, default=Path("outputs/mixed"), help="where figures are kept")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=["fisher"])
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=["nearest"], help="that plans are for")
    parser.add_argument("--methods", nargs="+", choices=("rtn", "gptq"), default=["rtn"])
    parser.add_argument("--windows", type=int, default=64, help="of the evaluation text; 0 takes all")
    parser.add_argument("--draws", type=int, default=3, help="random assignments of each budget")
    options = parser.parse_args()
    train, val = windows(options.texts, LENGTH)
    bench = Benchmark(options.work, calibration(train, CALIBRATION), val[: options.windows or None], options.draws)
    rows = [
        bench.row(limit, signal, rounding, method)
        for method in options.methods
        for signal in options.signals
        for rounding in options.roundings
        for limit in UNIFORM
    ]
    words = f"--signals {' '.join(options.signals)} --roundings {' '.join(options.roundings)}"
    words += f" --methods {' '.join(options.methods)} --windows {options.windows} --draws {options.draws}"
    record("mixed", f"python -m benchmarks.mixed --texts TEXTS {words}", rows)


class Benchmark:
    """Perplexities of arms, each measured once and kept in `work`."""

    def __init__(self, work: Path, calibration: Tensor, val: Tensor, draws: int) -> None:
        self.work, self.calibration, self.val, self.draws = work, calibration, val, draws
        self.candidates = integers()

    def row(self, limit: float, signal: str, rounding: str, method: str) -> dict[str, Any]:
        """One row of the result."""
        name, group = UNIFORM[limit]
        uniform = qat.Scheme(weight=partial(LSQQuantizer, bits=3, granularity=f"per_group_{group}"))
        found, seconds = self.plan(limit, signal, rounding)
        chance = [
            self.ppl(f"random{seed}@{limit}-{method}", self._drawn(limit, seed), method, limit)
            for seed in range(self.draws)
        ]
        row = {"bits_per_weight": limit, "model": MODEL, "text": "wiki106.val", "windows": len(self.val)}
        row |= {
            "signal": signal,
            "rounding": rounding,
            "method": method,
            "calibration_windows": len(self.calibration),
            "uniform": name,
        }
        row["ppl_fp"] = self.ppl("fp", None, method, limit)
        row["ppl_uniform"] = self.ppl(f"{name}-{method}", uniform, method, limit)
        larger, bits, scheme = LARGER
        row |= {"larger": larger, "larger_bits_per_weight": bits}
        row["ppl_larger"] = self.ppl(f"{larger}-{method}", scheme, method, bits)
        row |= {"ppl_random": statistics.geometric_mean(chance), "ppl_random_draws": chance}
        mixed = self._scheme(found.assignment)
        row["ppl_mixed"] = self.ppl(f"{_spelled(signal, rounding)}@{limit}-{method}", mixed, method, limit)
        row |= {"planned_bits_per_weight": found.bits_per_weight, "plan_seconds": seconds}
        row["layers"] = {c: sum(own == c for own in found.assignment.values()) for c in self.candidates}
        print(row, flush=True)
        return row

    def plan(self, limit: float, signal: str, rounding: str) -> tuple[Plan, float]:
        """The plan, and the seconds that its signal took when it was first measured."""
        path, started = self.work / f"{_spelled(signal, rounding)}.seconds.json", time.perf_counter()
        found = plan(load(), self._batches(BATCHES.get(signal, 2)), Budget(limit), self.candidates, signal,
                     folder=self.work / "rows", rounding=rounding)  # fmt: skip
        return found, kept(path, lambda: time.perf_counter() - started)

    def ppl(self, arm: str, scheme: qat.Scheme | None, method: str, limit: float) -> float:
        """Perplexity of one arm; none may spend more than `limit` bits per weight."""
        key = hashlib.sha256(repr((scheme, self.val.shape, self.calibration.shape)).encode()).hexdigest()[:12]
        found: float = kept(self.work / f"{arm}-{key}.json", lambda: self._measured(arm, scheme, method, limit))
        return found

    def _measured(self, arm: str, scheme: qat.Scheme | None, method: str, limit: float) -> float:
        model = load()
        if scheme is not None:
            qat.prepare(model, scheme)
            if method == "gptq":
                gptq(model, self._batches(8), folder=self.work / arm)
            bits = bits_per_weight(model)
            if bits > limit + 1e-9:
                raise SystemExit(f"{arm} spends {bits} bits per weight, more than {limit}: the comparison is not fair.")
        found = perplexity(model, self.val)
        discard(self.work / arm)
        return found

    def _batches(self, size: int) -> Batches:
        return [{"input_ids": ids, "labels": ids} for ids in self.calibration.to(device()).split(size)]

    def _drawn(self, limit: float, seed: int) -> qat.Scheme:
        return self._scheme(drawn(load(), self.candidates, limit, seed))

    def _scheme(self, assignment: Mapping[str, str]) -> qat.Scheme:
        rules = {
            name: Rule([layer for layer, own in assignment.items() if own == name], weight=candidate.factory)
            for name, candidate in self.candidates.items()
            if name in assignment.values()
        }
        return qat.Scheme(rules=rules)


def _spelled(signal: str, rounding: str) -> str:
    return signal if rounding == "nearest" else f"{signal}-{rounding}"


def drawn(model: nn.Module, candidates: Mapping[str, Candidate], limit: float, seed: int) -> dict[str, str]:
    """From the fewest bits everywhere, give layers drawn at random a bit more while the budget holds one."""
    layers = planned_layers(model)
    weights = {name: layer.weights for name, layer in layers.items()}
    spent = Budget(limit).spent(storage(layers, candidates), weights)
    names, groups = list(candidates), lock_groups(layers)
    level = dict.fromkeys(range(len(groups)), 0)
    left = limit - sum(own[names[0]] for own in spent.values())
    generator, open_groups = random.Random(seed), set(level)
    while open_groups:
        index = generator.choice(sorted(open_groups))
        now, more = names[level[index]], names[min(level[index] + 1, len(names) - 1)]
        price = sum(spent[layer][more] - spent[layer][now] for layer in groups[index])
        if more == now or price > left + 1e-9:
            open_groups.remove(index)
        else:
            level[index], left = level[index] + 1, left - price
    return {layer: names[level[index]] for index, group in enumerate(groups) for layer in group}


if __name__ == "__main__":
    main()
