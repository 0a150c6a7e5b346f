"""Options that a recipe of configs/experiment/ may have, one seed, compared by the evaluation texts of the mix.

    python -m benchmarks.tuning --texts TEXTS                       all TRIES; writes results/tuning.json; resumes
    python -m benchmarks.tuning --texts TEXTS --schemes int4-g64    those of one scheme

Runs are those of benchmarks/recovery.py with --steps steps a part: `start` in full precision, from which every try
trains on, beside `fp`. Peers choose among rates as we do. wiki106.val is not read: what is chosen here is judged on it
there.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpus import spread
from benchmarks.record import record
from benchmarks.recovery import MIX, SCHEMES, Arm, Plan, Row, command_of, run, split_texts

SEED = 0
# Stands for the folder of the full-precision model that trained as long as the longest recipe.
_FP = "{fp}"
_TEACHER = f"distill.teacher='{_FP}'"


def _rates(*rates: str, weight: str | None = None) -> list[tuple[str, ...]]:
    more = () if weight is None else (f"distill.weight={weight}",)
    return [(f"optimizer.lr={rate}", *more) for rate in rates]


# What peers are compared in.
_SCHEME_OF_PEER = {"torchao": "int4-g64", "llm-qat": "w4a8"}
# By scheme; and full precision and peers, so that none is beaten because it was trained badly.
TRIES: dict[str, list[tuple[str, ...]]] = {
    "start": _rates("1e-4", "2e-4", "3e-4", "5e-4"),
    "fp": _rates("5e-5", "1e-4", "2e-4", "3e-4"),
    "torchao": _rates("2e-5", "5e-5", "1e-4", "2e-4", "3e-4"),
    "llm-qat": _rates("5e-5", "1e-4", "2e-4"),
    "int4-g64": [
        *_rates("2e-5", "5e-5", "1e-4", "2e-4", "3e-4", "5e-4"),
        ("optimizer.lr=2e-4", "distill=none"),
        *_rates("2e-4", weight="0.2"),
        *_rates("2e-4", weight="0.8"),
        ("optimizer.lr=2e-4", _TEACHER),
        ("optimizer.lr=2e-4", _TEACHER, "distill.weight=0.8"),
        *(("optimizer.lr=2e-4", f"module.quantizer_lr={rate}") for rate in ("3e-4", "3e-3")),
        ("optimizer.lr=2e-4", "transforms=gptq"),
        ("optimizer.lr=2e-4", "callbacks.average.decay=0.99"),
    ],
    "int3-g64": [
        *_rates("1e-4", "2e-4", "4e-4", "8e-4"),
        *_rates("4e-4", weight="0.8"),
        ("optimizer.lr=2e-4", "quantizer@scheme.weight=stretched"),
        ("optimizer.lr=2e-4", "transforms=reconstruct", "calibration_batches=64"),
    ],
    "kmeans4-row": _rates("1e-4", "2e-4"),
    "kmeans3-row": [
        *_rates("1e-4", "2e-4", "4e-4"),
        *(("optimizer.lr=2e-4", f"module.quantizer_lr={rate}") for rate in ("3e-4", "3e-3")),
    ],
    "nf4-g64": _rates("1e-4", "2e-4"),
    "w8a8": _rates("5e-5", "1e-4", "2e-4"),
    "w4a8": _rates("1e-4", "2e-4"),
    "w4a4kv4": _rates("1e-4", "2e-4", "4e-4"),
    "int2-g64": [*_rates("2e-4", "4e-4", "8e-4"), ("optimizer.lr=4e-4", "transforms=calibrate")],
    "kmeans2-row": [*_rates("2e-4", "4e-4", "8e-4"), ("optimizer.lr=4e-4", "module.quantizer_lr=3e-3")],
    "ternary": _rates("2e-4", "4e-4", "8e-4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and *.val.txt")
    parser.add_argument("--work", type=Path, default=Path("outputs/tuning"), help="where runs leave what they find")
    parser.add_argument("--steps", type=int, default=700, help="of a part; 700 are an epoch of 5.75 million tokens")
    parser.add_argument("--schemes", nargs="+", choices=TRIES, default=list(TRIES))
    parser.add_argument("--model", nargs="+", default=["model=smollm2"], help="options of train.py that choose it")
    parser.add_argument("--given", nargs="+", default=[], help="options of train.py for every run")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at a time on every GPU")
    own = parser.parse_args()
    parts = own.steps, tuple(own.schemes), (SEED,), (), tuple(own.given), (MIX,)
    plan = Plan(own.texts.resolve(), own.work.resolve(), tuple(own.model), *parts)
    split_texts(plan)
    try:
        spread(partial(run, plan), first(plan), partial(after, plan), lambda arm: arm.key, own.per_gpu)
    finally:
        record("tuning", command_of(plan, "tuning"), list(rows_of(plan)), ("torchao", "triton"))


def tries(plan: Plan) -> list[Arm]:
    """All runs to choose among, the longest first."""
    teacher = str(plan.work / Arm("fp", None, SEED, _parts(plan)).key / "pretrained")
    found = [
        _arm(scheme, tuple(option.replace(_FP, teacher) for option in options))
        for scheme in plan.schemes
        for options in TRIES[scheme]
    ]
    return sorted(found, key=lambda arm: -SCHEMES[arm.scheme][1] if arm.scheme else 0)


def _arm(scheme: str, options: tuple[str, ...]) -> Arm:
    if scheme in SCHEMES:
        return Arm("ours", scheme, SEED, options=options)
    if scheme in _SCHEME_OF_PEER:
        return Arm(scheme, _SCHEME_OF_PEER[scheme], SEED, options=options)
    return Arm(scheme, None, SEED, part=int(scheme == "fp"), options=options)


def _parts(plan: Plan) -> int:
    """Of the longest recipe."""
    schemes = [_SCHEME_OF_PEER.get(scheme, scheme) for scheme in plan.schemes]
    return max((SCHEMES[scheme][1] for scheme in schemes if scheme in SCHEMES), default=0)


def first(plan: Plan) -> list[Arm]:
    """What waits for nothing."""
    return [*plan.first(), *(arm for arm in tries(plan) if arm.name == "start")]


def after(plan: Plan, arm: Arm) -> list[Arm]:
    """What waits for `arm`: tries whose teacher is `fp` for that one, all others for `start`."""
    if arm.options:
        return []
    longer = [Arm("fp", None, SEED, arm.part + 1)] if arm.part < _parts(plan) else []
    of_fp = [own for own in tries(plan) if _taught(own)]
    if arm.name == "fp":
        return longer or of_fp
    return longer + [own for own in tries(plan) if own.name != "start" and own not in of_fp]


def _taught(arm: Arm) -> bool:
    return any(option.startswith("distill.teacher=") for option in arm.options)


def rows_of(plan: Plan) -> Iterator[Row]:
    """One row for every try that ran, the best of a scheme first; `ppl_fp` is as in recovery.py."""
    rows: list[Row] = []
    for arm in tries(plan):
        if (found := plan.row(arm)) is None:
            continue
        options = [option.replace(str(plan.work), "WORK") for option in arm.options]
        scheme = str(arm.scheme if arm.name == "ours" else arm.name)
        row: Row = {"scheme": scheme, "options": options, "text": MIX}
        full = [plan.row(own) for own in plan.full_precision(SEED, SCHEMES[arm.scheme][1] if arm.scheme else arm.part)]
        ppl, best = found[MIX]["perplexity"], min(own[MIX]["perplexity"] for own in full if own)
        rows.append(row | {"ppl_fp": best, "ppl": ppl, "ratio": ppl / best, "seconds": found["seconds"]})
    order = {scheme: index for index, scheme in enumerate(plan.schemes)}
    yield from sorted(rows, key=lambda row: (order[row["scheme"]], row["ppl"]))


if __name__ == "__main__":
    main()
