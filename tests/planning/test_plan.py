"""Plans of whole models: what is stored is what was planned, and schemes of plans are taken as they are."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import qat
from qat.errors import InputError
from qat.export.artifact import bits_per_weight
from qat.numerics.metrics import stored_bits
from qat.planning import Budget, Candidate, draw, integers, plan, planned_layers, storage, write_scheme
from qat.planning.rounding import quantized
from qat.planning.scheme_yaml import patterns
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, NoQuantizer, NVFP4Quantizer
from qat.transforms import quant_layers
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, tiny_gpt2, tiny_mixtral
from tests.planning.test_sensitivity import batches

CONFIGS = Path(__file__).parents[2] / "configs"
FP8 = Candidate(
    partial(MinMaxQuantizer, bits=8, format="fp8_e4m3", granularity="per_channel", scale_dtype="float32"),
    "fp8",
    {"bits": 8},
)
CANDIDATES = integers((2, 3, 4, 8), group_size=16) | {"fp8": FP8, "full": Candidate(NoQuantizer, "none")}


def composed(folder, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"hydra.searchpath=[file://{folder}]", *overrides])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_scheme_makes_exactly_the_planned_bits(name, tmp_path):
    model = LANGUAGE_MODELS[name]().eval()
    found = plan(model, batches(5), Budget(5.0), CANDIDATES, "fisher")
    assert found.bits_per_weight <= 5.0
    write_scheme(found, tmp_path, "mine")
    for method in ("qat", "ptq"):
        prepared = copy.deepcopy(model)
        qat.prepare(prepared, instantiate(composed(tmp_path, "scheme=mine", f"method={method}").scheme))
        stored = {
            layer: sum(stored_bits(q.quantize(matrix)) for _, matrix, q in own.weights())
            for layer, own in quant_layers(prepared)
        }
        assert stored == {layer: found.bits[layer][c] for layer, c in found.assignment.items() if c != "full"}


def test_without_full_precision_the_artifact_has_the_planned_bits_per_weight(tmp_path):
    model = tiny_llama().eval()
    found = plan(model, batches(), Budget(4.1), integers((2, 3, 4, 5), group_size=16), "entropy")
    write_scheme(found, tmp_path, "mine")
    qat.prepare(model, instantiate(composed(tmp_path, "scheme=mine").scheme))
    assert len(set(found.assignment.values())) > 1
    assert bits_per_weight(qat.convert(model)) == pytest.approx(found.bits_per_weight)


def test_the_plan_is_better_than_the_same_bits_everywhere():
    found = plan(tiny_llama().eval(), batches(), Budget(4.0), integers((2, 3, 4), group_size=16), "kl", fused=[])
    uniform = found.uniform()
    assert uniform["int3"].spent == pytest.approx(4.0)
    assert found.cost < uniform["int3"].cost
    assert found.curve[0].spent == pytest.approx(3.0)
    assert found.curve[-1].spent == pytest.approx(5.0)


def test_outliers_keep_their_bits():
    """A layer whose errors the model cannot bear stays in 8-bit floats or full precision."""
    model = tiny_llama().eval()
    hurt = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        hurt.weight *= 30
    found = plan(model, batches(), Budget(6.0), CANDIDATES, "kl")
    assert found.assignment["model.layers.1.mlp.down_proj"] in ("int8", "fp8", "full")


def test_layers_can_be_told_what_they_may_get():
    allow = {"*.1.mlp.down_proj": "fp8", "*.down_proj": ["int2", "full"]}
    found = plan(tiny_llama(), [], Budget(20.0), CANDIDATES, "entropy", allow=allow)
    assert found.assignment["model.layers.1.mlp.down_proj"] == "fp8"
    assert found.assignment["model.layers.0.mlp.down_proj"] == "full"


def test_activations_follow_the_scheme(tmp_path):
    found = plan(tiny_llama(), [], Budget(8.0), CANDIDATES, "entropy", allow={"*.0.mlp.down_proj": "full"})
    write_scheme(found, tmp_path, "mine")
    cfg = composed(tmp_path, "scheme=mine", "quantizer@scheme.input=minmax_token", "scheme.input.bits=8")
    prepared = qat.prepare(tiny_llama(), instantiate(cfg.scheme))
    layers = dict(quant_layers(prepared))
    assert len(layers) == 13
    assert all(layer.input_quantizer.format.bits == 8 for layer in layers.values())


@pytest.mark.parametrize(
    "factory",
    [
        partial(LSQQuantizer, bits=3, symmetric=False, granularity="per_group_32"),
        partial(KMeansQuantizer, bits=3),
        partial(KMeansQuantizer, bits=4, codebook="per_tensor", learn_scale=True, granularity="per_group_16"),
        NVFP4Quantizer,
        FP8.factory,
    ],
    ids=["asymmetric", "kmeans", "kmeans per tensor", "nvfp4", "fp8"],
)
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mixtral])
def test_storage_is_what_is_stored(factory, build):
    layers = planned_layers(build())
    bits = storage(layers, {"it": Candidate(factory), "full": Candidate(NoQuantizer)})
    for name, layer in layers.items():
        assert bits[name]["it"] == sum(stored_bits(q) for q in quantized(layer, Candidate(factory)).values())
        assert bits[name]["full"] == 32 * layer.weights


def test_full_precision_costs_the_bits_it_has():
    layers = planned_layers(tiny_llama().to(torch.bfloat16))
    bits = storage(layers, {"full": Candidate(NoQuantizer)})
    assert all(bits[name]["full"] == 16 * layer.weights for name, layer in layers.items())


def matching(found, everything):
    from fnmatch import fnmatchcase

    return [name for name in everything if any(fnmatchcase(name, pattern) for pattern in found)]


def test_patterns_are_few_and_match_nothing_else():
    everything = [
        f"model.layers.{i}.{kind}" for i in range(30) for kind in ("mlp.up_proj", "attn.q_proj", "mlp.x.up_proj")
    ]
    whole = [name for name in everything if name.endswith("mlp.up_proj")]
    assert patterns(whole, everything) == ["model.layers.*.mlp.up_proj"]
    some = [f"model.layers.{i}.attn.q_proj" for i in (0, 1, 2, 7, 12, 20, 21)]
    assert patterns(some, everything) == [f"model.layers.{n}.attn.q_proj" for n in ("[0-27]", "12", "2[01]")]
    nested = [f"a.{i}.b" for i in range(3)]
    assert patterns(nested, [*nested, "a.0.c.b"]) == ["a.[0-2].b"]  # * would match a.0.c.b too
    assert patterns(["head"], ["head", "ahead"]) == ["head"]
    numbers = torch.randperm(130)[:50].tolist()
    random = [f"l.{i}.w" for i in numbers]
    everything = [f"l.{i}.w" for i in range(130)]
    assert sorted(matching(patterns(random, everything), everything)) == sorted(random)
    assert len(patterns(random, everything)) <= 13


def test_excluded_layers_stay_full_and_count_nowhere(tmp_path):
    model = tiny_llama()
    found = plan(model, [], Budget(4.0), integers((2, 4), group_size=16), "entropy", exclude="*.0.mlp.*")
    assert len(found.assignment) == 11
    write_scheme(found, tmp_path, "mine")
    prepared = qat.prepare(model, instantiate(composed(tmp_path, "scheme=mine").scheme))
    assert {name for name, _ in quant_layers(prepared)} == set(found.assignment)


def test_the_picture_shows_every_model(tmp_path):
    for build in (tiny_llama, tiny_mixtral):
        found = plan(build(), [], Budget(4.0), CANDIDATES, "entropy")
        draw(found, tmp_path / "plan.png", "tiny")
        assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": Budget(2.0)}, "below the least that these layers can spend, 3"),
        ({"exclude": "*.dwn_proj"}, r"exclude '\*\.dwn_proj' matches no layer"),
        ({"exclude": "*"}, "no layer to plan for"),
        ({"candidates": {}}, "no candidates"),
        ({"candidates": integers((3,), group_size=48)}, r"self_attn\.q_proj.*48"),
        ({"allow": {"*.up_proj": "int5"}}, "which is no candidate"),
        ({"allow": {"*.down": "int4"}}, "is of no use"),
        ({"allow": {"*": "int4", "*.up_proj": "int3"}}, "is of no use"),
        ({"allow": {"*.up_proj": "int2", "*.gate_proj": "int3"}}, "none in common"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr(sys.modules["qat.planning.plan"], "sensitivity", lambda *_: pytest.fail("measured"))
    options = {"budget": Budget(4.0), "candidates": CANDIDATES} | arguments
    with pytest.raises(InputError, match=message):
        plan(tiny_llama(), batches(), **options)


def test_a_prepared_model_is_refused():
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=partial(LSQQuantizer, bits=4)))
    with pytest.raises(InputError, match="quantized already"):
        planned_layers(model)


def test_layers_that_share_a_weight_are_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match="share one weight"):
        planned_layers(model)


def test_a_candidate_without_an_option_makes_no_yaml(tmp_path):
    candidates = {"own": Candidate(partial(LSQQuantizer, bits=4))}
    found = plan(tiny_llama(), [], Budget(5.0), candidates, "entropy")
    with pytest.raises(InputError, match="'own' has no option"):
        write_scheme(found, tmp_path, "mine")
