"""The benchmark that asks whether training beats rounding, on a toy."""

import json
import shutil

import pytest

from benchmarks import recovery, tables
from benchmarks.recovery import Arm, Plan


@pytest.fixture
def plan(tmp_path, tiny_folder, text_file):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.train", "a.val", "wiki106.val"):
        shutil.copy(text_file, texts / f"{name}.txt")
    given = ["trainer.accelerator=cpu", "data.batch_size=2", "data.sequence_length=32", "data.val_windows=2"]
    given += ["calibration_batches=2"]
    model = ("model=hf", f"model.name={tiny_folder}")
    return Plan(texts, tmp_path / "work", model, 3, ("int4-g64",), (0,), given=tuple(given))


@pytest.mark.parametrize(("scheme", "recipe", "parts"), [(s, *own) for s, own in recovery.SCHEMES.items()])
def test_a_recipe_says_what_it_is_meant_for_which_is_what_it_is_measured_with(plan, monkeypatch, scheme, recipe, parts):
    monkeypatch.setattr(Plan, "known", lambda plan, arm: None)
    plan = plan._replace(steps=700, given=())
    words = (recovery.ROOT / "configs" / "experiment" / f"{recipe}.yaml").read_text().splitlines()[3].split()[1:]
    assert f"trainer.max_steps={700 * parts}" in words
    assert set(words) <= set(recovery.options_of(plan, Arm("ours", scheme, 0)))


def run_serially(plan, first, after):
    """Every arm, one after the other; in the order in which they may run."""
    waiting, done = first, []
    while waiting:
        arm = waiting.pop(0)
        recovery.run(plan, arm)
        done.append(arm)
        waiting += after(arm)
    return done


def test_every_arm_runs_once_and_makes_a_row(plan, monkeypatch):
    monkeypatch.setitem(recovery.SCHEMES, "int4-g64", ("int4", 2))
    recovery.split_texts(plan)
    done = run_serially(plan, plan.first(), plan.after)
    names = [(arm.name, arm.scheme, arm.part) for arm in done]
    assert names[0] == ("start", None, 0)
    assert [name for name in names if name[0] == "fp"] == [("fp", None, part) for part in (1, 2)]
    assert {("ours", "int4-g64", 0), ("torchao", "int4-g64", 0)} <= set(names)
    assert names[-3:] == [(name, "int4-g64", 0) for name in recovery.ROUNDED]

    rows = recovery.rows_of(plan)
    assert [(row["scheme"], row["text"]) for row in rows] == [
        (scheme, text) for scheme in plan.schemes for text in ("wiki106.val", "mix.val")
    ]
    for row in rows:
        assert row["ppl_ptq"] == row[f"ppl_{row['ptq_name']}"]
        assert row["ppl_qat"] > 1
        assert 0 <= row["accuracy"] <= 1
    assert rows[0]["peer_name"] == "torchao"
    assert tables.recovery(rows).count("\n") == 3

    with monkeypatch.context() as patched:
        patched.setattr(recovery, "Job", None)
        assert run_serially(plan, plan.first(), plan.after) == done  # nothing is run again
    (start,), ours = plan.first(), Arm("ours", "int4-g64", 0)
    shorter = plan._replace(steps=2)
    assert recovery.made_from(plan, ours) == plan.known(ours)["made"]
    before = plan.known(start)
    assert recovery.run(shorter, start) != before  # but what other options made is
    assert recovery.made_from(plan, ours) != plan.known(ours)["made"]  # and what began with it
    assert recovery.command_of(shorter, "recovery").endswith(
        "--schemes int4-g64 --seeds 0 --given " + " ".join(plan.given)
    )


def test_full_precision_is_the_best_by_the_mix_and_recovery_is_of_what_rounding_loses(plan):
    """With figures written by hand."""

    def wrote(arm, wiki, mix):
        row = {"wiki106.val": {"perplexity": wiki, "accuracy": 0.5}, "mix.val": {"perplexity": mix, "accuracy": 0.5}}
        (plan.work / f"{arm.key}.json").write_text(json.dumps(row))

    plan = plan._replace(schemes=("int3-g64",), seeds=(0, 1))
    plan.work.mkdir()
    for seed in plan.seeds:
        wrote(Arm("start", None, seed), 9, 6)
        wrote(Arm("fp", None, seed, 1), 10, 5)
        for name, figures in {"rtn": (30, 20), "awq": (19, 15), "ours": (12 + 2 * seed, 6)}.items():
            wrote(Arm(name, "int3-g64", seed), *figures)
        wrote(Arm("gptq", "int3-g64", seed), 20, 14)
    wiki, mix = recovery.rows_of(plan)
    assert plan.best(0, 1) == Arm("fp", None, 0, 1)
    assert (wiki["ppl_fp"], wiki["ppl_ptq"], wiki["ptq_name"]) == (10, 20, "gptq")  # the best by the mix
    assert wiki["recovered"] == pytest.approx((0.8 + 0.6) / 2)
    assert wiki["recovered_spread"] == pytest.approx(0.1 * 2**0.5)
    assert wiki["ratio"] == pytest.approx(1.3)
    assert mix["recovered"] == pytest.approx(8 / 9)
    (plan.work / f"{Arm('gptq', 'int3-g64', 0).key}.json").write_text('{"refused": "it cannot"}')
    assert recovery.rows_of(plan)[0]["ptq_name"] == "awq"  # what a scheme refuses takes no part
