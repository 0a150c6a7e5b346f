"""`method=compare`: the arms it makes, what it concludes, and whole comparisons of a tiny model."""

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_modules.comparison.arms import _OF_THE_SCHEME, full_precision, rounded_arms, trained_arms
from lightning_modules.comparison.outcome import Outcome, Recovered, recovered, spread, verdict
from lightning_modules.comparison.picture import draw
from lightning_modules.comparison.recipe import chooses_recipe, spelled_out
from qat.errors import InputError
from tests.lightning_modules.test_cli import forks, shell  # noqa: F401
from tests.lightning_modules.test_recipes import CONFIGS, RECIPES

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
    assert found.recovered("qat").by_seed == pytest.approx([0.8, 0.6])
    assert found.wins("qat") == 2


def test_what_is_recovered_is_the_mean_of_the_shares_not_the_share_of_the_means():
    found = recovered([20.0, 110.0, 9.0], [12.0, 60.0, 9.0], [10.0, 10.0, 10.0])
    assert found.by_seed == pytest.approx([0.8, 0.5])  # in the last seed rounding loses nothing
    assert (found.mean, found.spread) == pytest.approx((0.65, 0.3 / 2**0.5))
    assert str(found) == "65% ± 21%"
    assert (Recovered([]).mean, Recovered([]).spread, str(Recovered([]))) == (None, None, "")
    assert (Recovered([0.5]).mean, Recovered([0.5]).spread, str(Recovered([0.5]))) == (0.5, None, "50%")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            outcome([12.0, 14.0]),
            "qat beats every post-training quantization in 2 of 2 seeds: it recovers 70% ± 14% of",
        ),
        (
            outcome([12.0, 22.0]),
            "qat beats every post-training quantization only in 1 of 2 seeds: it recovers 30% ± 71%",
        ),
        (outcome([22.0, 24.0]), "qat does NOT beat post-training quantization: it recovers -30% ± 14% of"),
        (
            outcome([12.0, 14.0], {"rtn": [9.0, 10.0]}),
            "qat does NOT beat post-training quantization: rtn loses nothing",
        ),
        (outcome([8.0, 9.0], {"rtn": [9.0, 10.0]}), "qat beats rtn in 2 of 2 seeds: rtn loses nothing against full"),
        # In one of the seeds rounding loses nothing, which hides neither the wins nor what it loses in the other.
        (
            outcome([9.0, 11.0], {"rtn": [9.5, 14.0]}),
            "qat beats rtn in 2 of 2 seeds: it recovers 75% of what rtn loses in the 1 of 2 seeds where it loses",
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_spelled_out_by_options_that_compose_the_same(recipe):
    def leaves(options):
        return OmegaConf.to_container(compose("train", options), resolve=False)

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = spelled_out([f"experiment={recipe}", "seed=3", "optimizer.lr=1"])
        assert leaves(options) == leaves([f"experiment={recipe}", "seed=3", "optimizer.lr=1"])
        assert not chooses_recipe(options)
        chosen = spelled_out([f"experiment={recipe}", "transforms=awq", "distill=minilm"])
        assert [option for option in chosen if option.startswith(("transforms=", "distill="))] == chosen[-2:]
        full = full_precision(options, 1).options
    assert not any(option.lstrip("+").startswith(_OF_THE_SCHEME) for option in full)
    assert any(option.startswith("++scheduler.num_warmup_steps=") for option in full)


def test_an_arm_may_have_another_recipe():
    given, arms = ["method=compare", "experiment=int4"], {"qat": ["method=qat"], "k": ["experiment=kmeans4"]}
    assert [arm.options for arm in trained_arms(given, arms, 0)] == [
        ["experiment=int4", "seed=0", "method=qat"],
        ["seed=0", "experiment=kmeans4"],
    ]


@pytest.mark.usefixtures("forks")
def test_a_recipe_is_compared_with_roundings_to_its_own_grid(shell):  # noqa: F811
    """The recipe as it is, and beside it full precision and roundings with its rates, schedule and bits."""
    words = [option for option in shell.options if not option.startswith("scheme")]
    words += ["trainer.max_steps=3", "calibration_batches=2", "transforms.reconstruct.steps=2"]
    output = shell.run(
        *("method=compare", "experiment=int2", *words, "compare.seeds=[0]", "compare.peers=[]", "hydra.run.dir=run"),
        '+compare.trained.ternary=["experiment=ternary"]',
        defaults=False,
    )
    assert all(arm in output for arm in ("rtn of it", "gptq of it", "awq of it", "qat", "ternary"))
    paths = [
        shell.folder / "run" / f"{arm}-0" / "native" / "quant_config.json" for arm in ("rtn", "gptq", "awq", "qat")
    ]
    layers = [json.loads(path.read_text())["layers"] for path in paths]
    assert all(own == layers[-1] for own in layers)
    assert layers[-1]["model.layers.0.mlp.up_proj"]["weights"]["weight"]["format"] == "levels4"


@pytest.mark.usefixtures("forks")
def test_a_comparison_of_nothing_is_refused(shell):  # noqa: F811
    assert "compare.seeds is []" in shell.fails("method=compare", "compare.seeds=[]")
    assert "compare.trained has no arm" in shell.fails("method=compare", "compare.trained.qat=null")
    assert "Two arms are called 'rtn'" in shell.fails("method=compare", '+compare.trained.rtn=["method=qat"]')
    assert "'int5' in the group 'experiment'" in shell.fails("method=compare", "experiment=int5")
    mistaken = '+compare.trained.b=["method=qat","scheme.weight.bitz=2"]'
    assert "scheme.weight.bitz" in shell.fails("method=compare", mistaken)
    assert "one device each" in shell.fails("method=compare", "trainer.devices=2")
