"""What weights become as candidates, and what the errors cost that GPTQ leaves."""

import sys

import pytest
import torch

from qat.errors import InputError
from qat.planning import integers, planned_layers, sensitivity
from qat.planning.fisher import fisher
from qat.planning.kfac import kfac
from qat.planning.rounding import errors, make_rounding, to_nearest
from qat.transforms import Rule, Scheme, gptq, prepare
from tests.conftest import tiny_llama
from tests.models import tiny_mixtral
from tests.planning.test_sensitivity import CANDIDATES, batches, logits

NAME = "model.layers.1.mlp.down_proj"


def texts(count=8, seed=0):
    """Texts in which some tokens are frequent, so that features hang together."""
    draws = torch.randint(0, 96 * 96, (count, 2, 32), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids} for ids in (draws.float().sqrt().long() % 24)]


@pytest.mark.parametrize("candidate", ["int2", "fp8"])
def test_gptq_leaves_what_the_transform_leaves(candidate):
    model, data = tiny_llama().eval(), texts()
    layer = planned_layers(model)[NAME]
    expected = make_rounding("gptq", model, [layer], data)(layer, CANDIDATES[candidate])["weight"]
    prepare(model, Scheme(rules={"one": Rule(NAME, weight=CANDIDATES[candidate].factory)}))
    gptq(model, data)
    found = model.get_submodule(NAME).weight.detach()
    assert (torch.isclose(found, expected, atol=1e-6)).float().mean() > 0.98  # a tie may fall on either side


def test_what_gptq_makes_up_for_is_no_cost():
    """GPTQ is worse than rounding on W and better on W X, which the diagonal does not see."""
    model, data = tiny_llama().eval(), texts()
    layer = planned_layers(model)[NAME]
    rounding = make_rounding("gptq", model, [layer], data)
    nearest, by_gptq = (errors(layer, CANDIDATES["int2"], own) for own in (to_nearest, rounding))
    assert by_gptq["weight"].square().sum() > nearest["weight"].square().sum()
    diagonal, factored = fisher(model, [layer], data), kfac(model, [layer], data)
    assert diagonal(layer, by_gptq) > 0.9 * diagonal(layer, nearest)
    assert factored(layer, by_gptq) < 0.6 * factored(layer, nearest)


def test_kl_is_that_of_the_model_with_one_layer_by_gptq():
    model, data = tiny_llama().eval(), texts()
    layers = planned_layers(model)
    table = sensitivity(model, data, layers, integers((2,), 16), "kl", rounding="gptq")
    before = logits(model, data)
    for name in (NAME, "model.layers.0.self_attn.q_proj"):
        alone = tiny_llama().eval()
        alone.load_state_dict(model.state_dict())
        prepare(alone, Scheme(rules={"one": Rule(name, weight=CANDIDATES["int2"].factory)}))
        after = logits(gptq(alone, data), data)
        divergence = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
        assert table[name]["int2"] == pytest.approx(float(divergence), rel=0.05)
    assert torch.equal(logits(model, data), before)


def test_what_is_not_linear_is_rounded_to_nearest():
    model = tiny_mixtral().eval()
    layer = planned_layers(model)["model.layers.0.mlp.experts"]
    rounding = make_rounding("gptq", model, [layer], batches())
    candidate = CANDIDATES["int4"]
    found, expected = rounding(layer, candidate), to_nearest(layer, candidate)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Killed(Exception):
    pass


def test_a_killed_rounding_goes_on_where_it_was(tmp_path, monkeypatch):
    module = sys.modules[sensitivity.__module__]
    model, data = tiny_llama().eval(), texts()
    layers, candidates = planned_layers(model), integers((2, 4), 16)
    expected = sensitivity(model, data, layers, candidates, "kfac", rounding="gptq")
    whole, done = module.errors, []

    def dying(*arguments):
        if len(done) == 9:
            raise Killed
        done.append(arguments[0].name)
        return whole(*arguments)

    monkeypatch.setattr(module, "errors", dying)
    with pytest.raises(Killed):
        sensitivity(model, data, layers, candidates, "kfac", tmp_path, "gptq")
    monkeypatch.setattr(module, "errors", lambda *a: done.append(a[0].name) or whole(*a))
    found = sensitivity(model, data, layers, candidates, "kfac", tmp_path, "gptq")
    assert len(done) == 2 * 14  # every layer and candidate once
    for name, own in expected.items():
        assert found[name] == pytest.approx(own, rel=1e-3)


def test_rows_are_those_of_the_same_rounding(tmp_path):
    model, data = tiny_llama().eval(), texts()
    layers = planned_layers(model)
    nearest = sensitivity(model, data, layers, CANDIDATES, "kfac", tmp_path)
    assert sensitivity(model, data, layers, CANDIDATES, "kfac", tmp_path, "gptq") != nearest
    assert len(list(tmp_path.glob("kfac-*.jsonl"))) == 2


def test_mistakes_are_refused():
    model = tiny_llama()
    layers = planned_layers(model)
    with pytest.raises(InputError, match=r"no rounding 'gtpq'\. Did you mean 'gptq'"):
        sensitivity(model, batches(), layers, CANDIDATES, "kfac", rounding="gtpq")
    with pytest.raises(InputError, match="entropy has no data"):
        sensitivity(model, [], layers, CANDIDATES, "entropy", rounding="gptq")
