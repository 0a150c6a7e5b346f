"""AWQ of whole models."""

import copy
import sys
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.numerics.gptq import output_errors
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, NoQuantizer, TableQuantizer
from qat.transforms import Scheme, awq, gptq, neighbours, prepare, quant_layers
from qat.transforms.blocks import walk
from qat.transforms.clip import clip_
from qat.transforms.gptq import fix_scales
from qat.transforms.plain import full_precision
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS
from tests.transforms.texts import batches, exact, logits, mean_error, same_function, with_outliers

QUANTIZERS = {
    "lsq": partial(LSQQuantizer, bits=3, granularity="per_group_16"),
    "minmax": partial(MinMaxQuantizer, bits=3, granularity="per_group_16"),
    "static": partial(MinMaxQuantizer, bits=3, dynamic=False),
    "asymmetric": partial(MinMaxQuantizer, bits=3, symmetric=False),
    "nf3": partial(TableQuantizer, bits=3, granularity="per_group_16"),
    "tensor": partial(MinMaxQuantizer, bits=4, granularity="per_tensor"),
    "kmeans": partial(KMeansQuantizer, bits=2),
}


def spread(model):
    return with_outliers(model, factor=10).eval()


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q != "kmeans"])  # its tables follow the weights anyway
def test_its_logits_on_fresh_data_are_nearer_than_rounded_ones(quantizer):
    model, fresh = spread(tiny_llama()), batches(seed=1)
    full = logits(model, fresh)
    model = prepare(model, Scheme(weight=QUANTIZERS[quantizer]))
    rounded = mean_error(model, fresh, full)
    assert mean_error(awq(model, batches(), grid=10), fresh, full) < 0.8 * rounded


def test_scales_that_are_fixed_are_found_anew():
    model, fresh = spread(tiny_llama()), batches(seed=1)
    full = logits(model, fresh)
    model = prepare(model, Scheme(weight=QUANTIZERS["minmax"]))
    fix_scales(model)
    rounded = mean_error(model, fresh, full)
    assert mean_error(awq(model, batches()), fresh, full) < 0.8 * rounded


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_scaling_alone_leaves_the_function_and_ships(name):
    model = exact(spread(LANGUAGE_MODELS[name]()))
    full = logits(model, batches(1))
    awq(prepare(model, Scheme(weight=QUANTIZERS["minmax"])), batches(2), grid=4, clip=False)
    with full_precision(model):
        assert same_function(model, batches(1), full)
    trained = logits(model, batches(1))
    assert torch.equal(logits(qat.convert(model), batches(1)), trained)


def output_error(model, data):
    """The squared error of what the linear layers return that read one source, by the name of the source."""
    seen = {}
    layers = [layer for _, layer in quant_layers(model)]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0])) for m in layers]
    with full_precision(model):
        logits(model, data)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        errors = {
            m: (torch.cat(x) @ (m.weight - m.weight_quantizer(m.weight)).T).square().sum() for m, x in seen.items()
        }
    return {fold.name: float(sum(errors[m] for m in fold.targets.values())) for fold in neighbours(model)}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_group_of_layers_gets_worse_and_most_get_better(quantizer):
    model = prepare(spread(tiny_llama()), Scheme(weight=QUANTIZERS[quantizer]))
    before = output_error(model, batches(2))
    after = output_error(awq(model, batches(2), clip=False), batches(2))
    norms = [name for name in before if name.endswith("norm")]
    assert len(norms) == 4
    assert all(after[name] < 1.01 * before[name] for name in norms)
    assert sum(after[name] for name in norms) < 0.99 * sum(before[name] for name in norms)


def test_one_exponent_is_none():
    model = prepare(spread(tiny_llama()), Scheme(weight=QUANTIZERS["minmax"]))
    before = copy.deepcopy(model.state_dict())
    awq(model, batches(1), grid=1, clip=False)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if tensor.is_floating_point())


# LSQ starts at the scale of least squared error, which clips already.
@pytest.mark.parametrize("quantizer", ["minmax", "static", "asymmetric", "tensor", "nf3"])
def test_clipping_lowers_the_error_of_the_outputs(quantizer):
    model = prepare(tiny_llama(), Scheme(weight=QUANTIZERS[quantizer]))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data[:, 5] *= 8
    x = torch.randn(256, 64) * torch.linspace(0.1, 3, 64)
    weight, moment = layer.weight.detach().clone(), x.T @ x
    layer.weight_quantizer.initialize(weight)
    rounded = output_errors(weight, layer.weight_quantizer(weight), moment).sum()
    clip_(layer, moment)
    assert output_errors(weight, layer.weight_quantizer(layer.weight), moment).sum() < 0.95 * rounded


def test_gptq_goes_on_from_there():
    model, fresh = spread(tiny_llama()), batches(seed=1)
    full = logits(model, fresh)
    model = awq(prepare(model, Scheme(weight=QUANTIZERS["lsq"])), batches(), clip=False)
    scaled = mean_error(model, fresh, full)
    assert mean_error(gptq(model, batches()), fresh, full) < 0.8 * scaled


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model = prepare(spread(tiny_llama()), Scheme(weight=QUANTIZERS["lsq"]))
    again = copy.deepcopy(model)
    whole = awq(copy.deepcopy(model), batches(2))
    done = []

    def dying_walk(*arguments, killed_at):
        def until_killed(block):
            if block.index == killed_at:
                raise Killed
            done.append(block.index)
            arguments[2](block)

        walk(*arguments[:2], until_killed, *arguments[3:])

    module = sys.modules["qat.transforms.awq"]
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=1))
    with pytest.raises(Killed):
        awq(model, batches(2), folder=tmp_path)
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=None))
    awq(again, batches(2), folder=tmp_path)
    assert done == [0, 1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_bad_input_is_named():
    model = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"]))
    with pytest.raises(InputError, match="grid"):
        awq(model, batches(1), grid=0)
    with pytest.raises(InputError, match="calibration_batches"):
        awq(model, [])
    with pytest.raises(InputError, match="prepare"):
        awq(tiny_llama(), batches(1))
    assert not any(isinstance(layer.weight_quantizer, NoQuantizer) for _, layer in quant_layers(model))
