"""SmoothQuant of whole models."""

import copy
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.quantizers import MinMaxQuantizer
from qat.transforms import Scheme, calibrate, neighbours, prepare, smoothquant
from qat.transforms.plain import full_precision
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS
from tests.transforms.texts import batches, exact, logits, mean_error, same_function, with_outliers

INT8 = partial(MinMaxQuantizer, bits=8)
TOKEN = partial(MinMaxQuantizer, bits=8, granularity="per_token")
STATIC = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_model_computes_what_it_did(name):
    model = exact(with_outliers(LANGUAGE_MODELS[name]()))
    full = logits(model, batches(1))
    smoothquant(prepare(model, Scheme(weight=INT8, input=TOKEN)), batches(2), between_layers=True)
    with full_precision(model):
        assert same_function(model, batches(1), full)


@pytest.mark.parametrize("activations", [TOKEN, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "gemma3", "mixtral"])
def test_outliers_cost_less(name, activations):
    model, fresh = with_outliers(LANGUAGE_MODELS[name]()).eval(), batches(2, seed=1)
    full = logits(model, fresh)
    rounded = prepare(model, Scheme(weight=INT8, input=activations))
    smoothed = calibrate(smoothquant(copy.deepcopy(rounded), batches()), batches())
    assert mean_error(smoothed, fresh, full) < 0.7 * mean_error(calibrate(rounded, batches()), fresh, full)


def test_scales_are_those_of_the_paper():
    model = prepare(with_outliers(tiny_llama()).eval(), Scheme(weight=INT8, input=TOKEN))
    fold = neighbours(model)[0]
    seen, weights = [], [layer.weight.detach().clone() for layer in fold.targets.values()]
    hook = next(iter(fold.targets.values())).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with full_precision(model):
        logits(model, batches(3))
    hook.remove()
    x, w = torch.cat(seen).abs().amax((0, 1)), torch.cat(weights).abs().amax(0)
    smoothquant(model, batches(3), alpha=0.7)
    for layer, weight in zip(fold.targets.values(), weights, strict=True):
        assert torch.allclose(layer.weight, weight * (x**0.7 / w**0.3), rtol=1e-5)


def test_what_one_layer_hands_to_another_is_left_alone_unless_asked():
    model = prepare(tiny_llama().eval(), Scheme(weight=INT8, input=TOKEN))
    down = model.model.layers[0].mlp.down_proj
    before = down.weight.detach().clone()
    smoothquant(model, batches(1))
    assert torch.equal(down.weight, before)
    smoothquant(model, batches(1), between_layers=True)
    assert not torch.equal(down.weight, before)


def test_it_ships(tmp_path):
    model = prepare(with_outliers(tiny_llama()).eval(), Scheme(weight=INT8, input=STATIC))
    calibrate(smoothquant(model, batches(2)), batches(2))
    trained = logits(model, batches(1))
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    assert torch.equal(logits(loaded, batches(1)), trained)


def test_bad_input_is_named():
    model = prepare(tiny_llama(), Scheme(weight=INT8, input=TOKEN))
    with pytest.raises(InputError, match="alpha"):
        smoothquant(model, batches(1), alpha=1.5)
    with pytest.raises(InputError, match="calibration_batches"):
        smoothquant(model, [])
    with pytest.raises(InputError, match="w8a8"):
        smoothquant(prepare(tiny_llama(), Scheme(weight=INT8)), batches(1))
