"""GPTQ of whole models."""

import copy
import sys
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer
from qat.transforms import Scheme, gptq, prepare, quant_layers
from qat.transforms.blocks import walk
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, tiny_gpt2

QUANTIZERS = {
    "lsq": partial(LSQQuantizer, bits=3, granularity="per_group_16"),
    "minmax": partial(MinMaxQuantizer, bits=3, granularity="per_group_16"),
    "nf3": partial(TableQuantizer, bits=3, granularity="per_group_16"),
    "kmeans": partial(KMeansQuantizer, bits=2),
}


def batches(count=6, seed=0):
    """Texts in which some tokens are frequent, so that features hang together."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 96 * 96, (count, 2, 32), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in (draws.float().sqrt().long() % 24)]


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(input_ids=batch["input_ids"], use_cache=False).logits for batch in data])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_its_logits_are_nearer_to_full_precision_than_rounded_ones(quantizer):
    model = tiny_llama().eval()
    data, fresh = batches(), batches(seed=1)
    full = logits(model, fresh)
    rounded = prepare(copy.deepcopy(model), Scheme(weight=QUANTIZERS[quantizer]))
    errors = {"rounded": (logits(rounded, fresh) - full).square().mean()}
    errors["gptq"] = (logits(gptq(rounded, data), fresh) - full).square().mean()
    assert errors["gptq"] < 0.8 * errors["rounded"]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_kind_of_model_goes_through_and_ships(name, tmp_path):
    model = LANGUAGE_MODELS[name]().eval()
    prepare(model, Scheme(weight=QUANTIZERS["minmax"]))
    gptq(model, batches(2))
    trained = logits(model, batches(1))
    assert torch.equal(logits(qat.convert(model), batches(1)), trained)


def test_weights_lie_on_their_grids():
    model = gptq(prepare(tiny_llama(), Scheme(weight=QUANTIZERS["nf3"])), batches(2))
    for name, layer in quant_layers(model):
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight), name


def test_true_sequential_sees_the_layers_before():
    one = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"]))
    other = copy.deepcopy(one)
    gptq(one, batches(2))
    gptq(other, batches(2), true_sequential=True)
    first, second = (dict(quant_layers(model)) for model in (one, other))
    queries, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert torch.equal(first[queries].weight, second[queries].weight)
    assert not torch.equal(first[down].weight, second[down].weight)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["kmeans"]))
    again = copy.deepcopy(model)
    whole = gptq(copy.deepcopy(model), batches(2))
    rounded = []

    def dying_walk(*arguments, killed_at):
        def until_killed(block):
            if block.index == killed_at:
                raise Killed
            rounded.append(block.index)
            arguments[2](block)

        walk(*arguments[:2], until_killed, *arguments[3:])

    module = sys.modules["qat.transforms.gptq"]
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=1))
    with pytest.raises(Killed):
        gptq(model, batches(2), folder=tmp_path)
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=None))
    gptq(again, batches(2), folder=tmp_path)
    assert rounded == [0, 1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_blocks_of_other_options_are_not_taken_up(tmp_path):
    model = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"]))
    other = copy.deepcopy(model)
    alone = gptq(copy.deepcopy(model), batches(2), act_order=False)
    gptq(model, batches(2), folder=tmp_path)
    gptq(other, batches(2), act_order=False, folder=tmp_path)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_model_is_trained_further():
    model = gptq(prepare(tiny_llama(), Scheme(weight=QUANTIZERS["minmax"])), batches(2))
    model.train()(**batches(1)[0]).loss.backward()
    assert all(layer.weight.grad.any() for _, layer in quant_layers(model))


def test_bad_input_is_named():
    model = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"]))
    with pytest.raises(InputError, match="calibration_batches"):
        gptq(copy.deepcopy(model), [])
    with pytest.raises(InputError, match="list of blocks"):
        gptq(prepare(torch.nn.Sequential(torch.nn.Linear(16, 16)), Scheme(weight=QUANTIZERS["lsq"])), batches())
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"model\.layers\.0.*(NaN|infinity)"):
        gptq(model, batches(1))


def test_gpt2_has_biases_and_layers_of_its_own():
    model = tiny_gpt2().eval()
    full = logits(model, batches(1))
    prepare(model, Scheme(weight=QUANTIZERS["lsq"]))
    rounded = (logits(model, batches(1)) - full).square().mean()
    assert (logits(gptq(model, batches(2)), batches(1)) - full).square().mean() < rounded
