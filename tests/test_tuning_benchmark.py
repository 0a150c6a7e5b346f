"""The benchmarks that spread runs over GPUs, and choose among options."""

import pytest

from benchmarks import recovery, tuning
from benchmarks.gpus import spread
from benchmarks.recovery import Arm
from tests.test_recovery_benchmark import plan, run_serially  # noqa: F401  a fixture


def test_every_try_runs_and_the_best_comes_first(plan, monkeypatch):  # noqa: F811
    options = [("optimizer.lr=1e-3",), ("optimizer.lr=1e-4", f"distill.teacher='{tuning._FP}'")]
    monkeypatch.setitem(tuning.TRIES, "int4-g64", options)
    monkeypatch.setitem(tuning.TRIES, "start", [("optimizer.lr=1e-3",)])
    plan = plan._replace(scored=(recovery.MIX,), schemes=("start", "int4-g64"))
    recovery.split_texts(plan)
    done = run_serially(plan, tuning.first(plan), lambda arm: tuning.after(plan, arm))
    assert [arm.name for arm in done] == ["start", "start", "fp", "ours", "ours"]
    assert done[-1].options == ("optimizer.lr=1e-4", f"distill.teacher='{plan.work}/fp-1-seed0/pretrained'")
    assert set(plan.known(done[-1])) == {"made", "seconds", recovery.MIX}  # nothing is known of what it is judged by

    rows = list(tuning.rows_of(plan))
    assert [row["scheme"] for row in rows] == ["start", "int4-g64", "int4-g64"]
    assert rows[1]["ppl"] <= rows[2]["ppl"]
    assert rows[1]["ratio"] == rows[1]["ppl"] / rows[1]["ppl_fp"]
    assert {"distill.teacher='WORK/fp-1-seed0/pretrained'"} <= {option for row in rows for option in row["options"]}


def _doubled(item):
    if item == 3:
        raise ValueError("three")
    return 2 * item


def _next(item):
    return [item + 2] if item < 5 else []


def test_what_fails_is_named_and_all_else_runs(capfd):
    with pytest.raises(SystemExit, match=r"These failed.*item 3"):
        spread(_doubled, [1, 2], _next, "item {}".format)
    printed = capfd.readouterr().out
    assert "item 6 12 (" in printed
    assert "item 3 failed: ValueError('three')" in printed
    assert "item 5" not in printed


def test_options_tell_runs_apart():
    keys = {Arm("ours", "int4-g64", 0, options=options).key for options in [(), ("a.b=1e-5",), ("a.b=1e-4",)]}
    assert keys == {"ours-int4-g64-seed0", "ours-int4-g64-seed0-a.b=1e-5", "ours-int4-g64-seed0-a.b=1e-4"}
