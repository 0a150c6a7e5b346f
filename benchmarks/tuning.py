"""Options that a recipe of configs/experiment/ may have, one seed, compared by the evaluation texts of the mix.

    python -m benchmarks.tuning --texts TEXTS                       all TRIES; writes results/tuning.json; resumes
    python -m benchmarks.tuning --texts TEXTS --schemes int4-g64    those of one scheme

Runs are those of benchmarks/recovery.py with --steps steps a part: `start` in full precision, from which every try
trains on, beside `fp`. Peers choose among rates as we do. wiki106.val is not read: what is chosen here is judged on it
there.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpus import spread
from benchmarks.record import record
from benchmarks.recovery import MIX, SCHEMES, Arm, Plan, Row, command_of, parser_of, plan_of, run

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
    "start": [(), *_rates("1e-4", "2e-4", "5e-4")],
    "fp": [(), *_rates("5e-5", "2e-4", "3e-4")],
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
    own = parser_of(str(__doc__), Path("outputs/tuning"), list(TRIES)).parse_args()
    plan = plan_of(own, (SEED,), scored=(MIX,))
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


def _arm(scheme: str, options: tuple[str, ...] = ()) -> Arm:
    if scheme in SCHEMES:
        return Arm("ours", scheme, SEED, options=options)
    if scheme in _SCHEME_OF_PEER:
        return Arm(scheme, _SCHEME_OF_PEER[scheme], SEED, options=options)
    return Arm(scheme, None, SEED, part=int(scheme == "fp"), options=options)


def _parts(plan: Plan) -> int:
    """Of the longest recipe."""
    return max(SCHEMES[arm.scheme][1] if arm.scheme else arm.part for arm in map(_arm, plan.schemes))


def first(plan: Plan) -> list[Arm]:
    """What waits for nothing."""
    return list(dict.fromkeys([*plan.first(), *(arm for arm in tries(plan) if arm.name == "start")]))


def after(plan: Plan, arm: Arm) -> list[Arm]:
    """What waits for `arm`: tries whose teacher is `fp` for that one, all others for `start`."""
    if arm.options:
        return []
    found = [Arm("fp", None, SEED, arm.part + 1)] if arm.part < _parts(plan) else []
    if arm.name == "start":
        found += [own for own in tries(plan) if own.name != "start" and not _taught(own)]
    elif arm.part == _parts(plan):
        found += [own for own in tries(plan) if _taught(own)]
    return list(dict.fromkeys(found))


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
        full = plan.full_precision(SEED, SCHEMES[arm.scheme][1] if arm.scheme else arm.part)
        known = [row[MIX]["perplexity"] for row in map(plan.row, full) if row]
        ppl = found[MIX]["perplexity"]
        best = min(known, default=ppl)  # none is known where all of them failed
        rows.append(row | {"ppl_fp": best, "ppl": ppl, "ratio": ppl / best, "seconds": found["seconds"]})
    order = {scheme: index for index, scheme in enumerate(plan.schemes)}
    yield from sorted(rows, key=lambda row: (order[row["scheme"]], row["ppl"]))


if __name__ == "__main__":
    main()
