"""`method=compare`: the arms it makes, what it concludes, and whole comparisons of a tiny model."""

import json

import pytest
from omegaconf import OmegaConf

from lightning_modules.comparison.arms import _OF_THE_SCHEME, full_precision, rounded_arms, trained_arms
from lightning_modules.comparison.outcome import Outcome, spread, verdict
from lightning_modules.comparison.picture import draw
from qat.errors import InputError
from tests.lightning_modules.test_cli import forks, shell  # noqa: F401

GIVEN = [
    *("method=compare", "compare.seeds=[0,1]", "scheme=w4", "quantizer@scheme.weight=lsq", "scheme.weight.bits=3"),
    *("model=hf", "model.name=x", "data=text", "trainer.max_steps=5", "hydra.run.dir=run", "+compare.trained.b=[x=1]"),
]


def test_every_arm_has_the_same_options_but_its_own():
    (trained,) = trained_arms(GIVEN, OmegaConf.create({"qat": ["method=qat"], "other": None}), 1)
    common = ["data=text", "trainer.max_steps=5", "seed=1"]
    scheme = ["scheme=w4", "quantizer@scheme.weight=lsq", "scheme.weight.bits=3"]
    model = ["model=hf", "model.name=x"]
    assert trained == ("qat", [*scheme, *model, *common, "method=qat"])
    assert full_precision(GIVEN, 1) == ("fp", [*model, *common, "method=fp"])
    distilled = [*GIVEN, "distill=logits", "distill.weight=1", "transforms=fisher"]
    assert full_precision(distilled, 1) == full_precision(GIVEN, 1)
    loading = ["model=hf", "model.name=y"]
    arms = rounded_arms(distilled, {"rtn": [], "gptq": ["transforms=gptq"]}, 1, loading)
    assert arms[0] == ("rtn", [*scheme, *common, *loading, "method=ptq"])
    assert arms[1] == ("gptq", [*scheme, *common, *loading, "transforms=gptq", "method=ptq"])


GROUPS = [
    *("scheme", "quantizer", "kv", "transforms", "distill", "module.freeze"),
    *("callbacks.smooth_start", "callbacks.soft", "callbacks.refresh", "callbacks.nested"),
    *("callbacks.dampening", "callbacks.freezing", "callbacks.precision"),
]


@pytest.mark.parametrize("group", GROUPS)
def test_full_precision_has_nothing_of_how_to_quantize(group):
    assert set(GROUPS) == set(_OF_THE_SCHEME)
    given = [f"{group}=x", f"+{group}.bits=4", f"{group}@scheme.weight=y"]
    assert full_precision([*GIVEN, *given], 1) == full_precision(GIVEN, 1)


@pytest.mark.parametrize("arms", [{"fp": []}, {"a": "transforms=gptq"}, {"a": [1]}])
def test_arms_that_are_none_are_refused(arms):
    with pytest.raises(InputError, match="arm"):
        trained_arms(GIVEN, arms, 0)


def outcome(trained, rounded=None, full=(10.0, 10.0)):
    rounded = {"rtn": [30.0, 30.0], "gptq": [20.0, 20.0]} if rounded is None else rounded
    return Outcome([25.0, 25.0], list(full), rounded, {"qat": list(trained)})


def test_what_is_recovered_is_counted_from_the_best_rounding():
    found = outcome([12.0, 14.0])
    assert found.best == "gptq"
    assert found.recovered("qat") == pytest.approx(0.7)
    assert found.recovered_by_seed("qat") == pytest.approx([0.8, 0.6])
    assert found.wins("qat") == 2


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            outcome([12.0, 14.0]),
            "qat beats every post-training quantization in 2 of 2 seeds: it recovers 70% (60% to 80%)",
        ),
        (outcome([12.0, 22.0]), "qat beats every post-training quantization only in 1 of 2 seeds: it recovers 30%"),
        (outcome([22.0, 24.0]), "qat does NOT beat post-training quantization: it recovers -30% (-40% to -20%) of"),
        (
            outcome([12.0, 14.0], {"rtn": [9.0, 10.0]}),
            "qat does NOT beat post-training quantization: rtn loses nothing",
        ),
        (outcome([8.0, 9.0], {"rtn": [9.0, 10.0]}), "qat beats rtn in 2 of 2 seeds: rtn loses nothing against full"),
        # In one of the seeds rounding loses nothing, which hides neither the wins nor what it loses in the other.
        (
            outcome([9.0, 11.0], {"rtn": [9.5, 14.0]}),
            "qat beats rtn in 2 of 2 seeds: it recovers 100% of what rtn loses",
        ),
        (outcome([12.0, 14.0], {}), "qat was compared with no post-training quantization"),
    ],
)
def test_the_verdict_says_which_way_it_went(found, words):
    assert verdict(found, "qat").startswith(words)


def test_one_seed_has_no_spread(tmp_path):
    found = Outcome([25.0], [10.0], {"gptq": [20.0]}, {"qat": [12.0]})
    assert verdict(found, "qat") == "qat beats gptq with this seed: it recovers 80% of what gptq loses."
    assert (spread([1.0]), spread([1.0, 3.0])) == ("", "1.41")
    assert draw(found, tmp_path / "picture.png", "title").stat().st_size > 5_000


@pytest.mark.usefixtures("forks")
def test_a_comparison_is_the_runs_that_it_says_and_each_is_done_once(shell):  # noqa: F811
    options = ("trainer.max_steps=6", "optimizer.lr=3e-3", "calibration_batches=4")
    words = (
        "method=compare",
        *options,
        "compare.seeds=[0,3]",
        "compare.peers=[]",
        "compare.rounded.awq=null",
        "hydra.run.dir=run",
    )
    output = shell.run(*words)
    kept = json.loads((shell.folder / "run" / "comparison.json").read_text())["arms"]
    assert set(kept) == {f"{arm}-{seed}" for arm in ("fp", "rtn", "gptq", "qat") for seed in (0, 3)}
    assert (shell.folder / "run" / "comparison.png").stat().st_size > 5_000
    assert "full precision, trained" in output
    assert "post-training quantization" in output
    assert kept["fp-0"]["perplexity"] != kept["fp-3"]["perplexity"]

    shell.run(*options, "method=qat", "seed=3", "hydra.run.dir=alone")
    assert shell.rows("alone")["converted, saved, loaded"]["perplexity"] == kept["qat-3"]["perplexity"]
    alike = [option for option in shell.options if not option.startswith("scheme")]
    shell.run(*alike, *options, "method=fp", "seed=3", "hydra.run.dir=full", defaults=False)
    assert shell.rows("full")["after training"]["perplexity"] == kept["fp-3"]["perplexity"]

    assert "scheme.weight.bits=2" in shell.fails("resume=run", "scheme.weight.bits=2", defaults=False)
    path = shell.folder / "run" / "comparison.json"
    report = json.loads(path.read_text())
    del report["arms"]["qat-3"]
    path.write_text(json.dumps(report))
    again = shell.run("resume=run", defaults=False)
    assert "--- qat, seed 3" in again
    assert again.count("---") == 1
    assert json.loads(path.read_text())["arms"] == kept


@pytest.mark.usefixtures("forks")
def test_what_is_pruned_is_pruned_once_and_codebooks_are_refreshed_where_there_are_any(shell):  # noqa: F811
    words = ["prune=structured", "prune.structured.channels=0.5", "quantizer@scheme.weight=kmeans"]
    words += ["callbacks.refresh.every_n_steps=1", "scheme.weight.granularity=per_channel", "trainer.max_steps=2"]
    words += ["compare.seeds=[0]", "compare.rounded={rtn: []}", "compare.peers=[]"]
    output = shell.run("method=compare", *words, "hydra.run.dir=run")
    assert "rtn" in output
    sizes = {
        json.loads((shell.folder / "run" / path / "config.json").read_text())["intermediate_size"]
        for path in ("fp-0/pretrained", "rtn-0/native", "qat-0/native")
    }
    assert sizes == {64}


@pytest.mark.usefixtures("forks")
def test_a_comparison_of_nothing_is_refused(shell):  # noqa: F811
    assert "compare.seeds is []" in shell.fails("method=compare", "compare.seeds=[]")
    assert "compare.trained has no arm" in shell.fails("method=compare", "compare.trained.qat=null")
    assert "Two arms are called 'rtn'" in shell.fails("method=compare", '+compare.trained.rtn=["method=qat"]')
    assert "give it to an arm" in shell.fails("method=compare", "experiment=kmeans3")
    mistaken = '+compare.trained.b=["method=qat","scheme.weight.bitz=2"]'
    assert "scheme.weight.bitz" in shell.fails("method=compare", mistaken)
    assert "one device each" in shell.fails("method=compare", "trainer.devices=2")
