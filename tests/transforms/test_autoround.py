"""AutoRound of whole models."""

import copy
import sys
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.numerics.gaps import gaps
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer, VectorQuantizer
from qat.transforms import Scheme, autoround, awq, calibrate, gptq, magnitude, prepare, quant_layers, restructure
from qat.transforms.blocks import walk
from qat.transforms.rounding import LearnedRounding, on_grid
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS
from tests.transforms.texts import batches, logits, mean_error, with_outliers

QUANTIZERS = {
    "lsq": partial(LSQQuantizer, bits=3, granularity="per_group_16"),
    "lsq_plus": partial(LSQQuantizer, bits=3, granularity="per_group_16", symmetric=False),
    "stretched": partial(LSQQuantizer, bits=2, granularity="per_group_16", grid="stretched"),
    "minmax": partial(MinMaxQuantizer, bits=3, granularity="per_group_16"),
    "fp4": partial(MinMaxQuantizer, format="fp4_e2m1"),
    "nf3": partial(TableQuantizer, bits=3, granularity="per_group_16"),
    "nf3, double": partial(TableQuantizer, bits=3, granularity="per_group_16", double_quant=True),
    "kmeans": partial(KMeansQuantizer, bits=2),
}
quickly = partial(autoround, steps=30, batch_size=4)


def textured(**options):
    """Norms with gains of their own make features unlike each other, as training does."""
    return with_outliers(tiny_llama(**options), factor=3).eval()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_its_logits_on_fresh_data_are_nearer_than_rounded_ones(quantizer):
    model, fresh = textured(), batches(seed=1)
    full = logits(model, fresh)
    model = prepare(model, Scheme(weight=QUANTIZERS[quantizer]))
    rounded = mean_error(model, fresh, full)
    assert mean_error(quickly(model, batches(16)), fresh, full) < 0.8 * rounded


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_kind_of_model_goes_through_and_ships(name):
    model = prepare(LANGUAGE_MODELS[name]().eval(), Scheme(weight=QUANTIZERS["minmax"]))
    quickly(model, batches(2), steps=3)
    trained = logits(model, batches(1))
    assert torch.equal(logits(qat.convert(model), batches(1)), trained)


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_weights_lie_on_their_grids(quantizer, start):
    model = quickly(prepare(textured(), Scheme(weight=QUANTIZERS[quantizer])), batches(2), steps=3, start=start)
    for name, layer in quant_layers(model):
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight), name


def block_outputs(model, data):
    """What leaves every block of a Llama."""
    found = [[] for _ in model.model.layers]
    hooks = [
        layer.register_forward_hook(lambda m, args, output, own=own: own.append(output))
        for layer, own in zip(model.model.layers, found, strict=True)
    ]
    logits(model, data)
    for hook in hooks:
        hook.remove()
    return [torch.cat(own) for own in found]


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_no_block_gets_worse_on_the_data(start):
    """Not even by steps that are far too long."""
    model, data = textured(), batches(2)
    full = block_outputs(model, data)
    model = prepare(model, Scheme(weight=QUANTIZERS["lsq"]))
    before = block_outputs(model, data)[0]
    quickly(model, data, steps=1, scale_reach=1.0, start=start)
    after = block_outputs(model, data)[0]
    assert (after - full[0]).square().mean() <= (before - full[0]).square().mean()


def test_what_is_worse_than_rounding_is_rounded(monkeypatch):
    model = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"]))
    before = copy.deepcopy(model)
    step = LearnedRounding.step_
    monkeypatch.setattr(LearnedRounding, "step_", lambda self, g, *lengths: step(self, g, *(-4 * d for d in lengths)))
    quickly(model, batches(2))
    for (name, layer), (_, own) in zip(quant_layers(model), quant_layers(before), strict=True):
        assert torch.equal(layer.weight, on_grid(own.weight_quantizer, own.weight)), name


def test_a_weight_goes_to_one_of_the_two_grid_values_around_it():
    model = prepare(textured(), Scheme(weight=QUANTIZERS["minmax"]))
    before = {name: layer.weight.detach().clone() for name, layer in quant_layers(model)}
    quickly(model, batches(4), scale_reach=0.0)
    moved = 0
    for name, layer in quant_layers(model):
        params = layer.weight_quantizer.qparams(layer.weight).for_view()
        view = layer.weight_quantizer.granularity.view
        gap = gaps(view(before[name]), params, layer.weight_quantizer.format)
        assert (view(layer.weight - before[name]).abs() <= 1.0001 * gap).all()
        moved += int((layer.weight != on_grid(layer.weight_quantizer, before[name])).sum())
    assert moved > 1000


def test_scales_are_learned_and_bounded():
    model = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"]))
    before = {name: layer.weight_quantizer.log_scale.detach().clone() for name, layer in quant_layers(model)}
    quickly(model, batches(4), scale_reach=0.25)
    changes = [layer.weight_quantizer.log_scale - before[name] for name, layer in quant_layers(model)]
    assert all(0.01 < change.abs().max() < 0.26 for change in changes)


def test_activation_quantizers_are_at_work():
    """What is learned for quantized activations serves them better than what is learned without them."""
    data, model = batches(16), textured()
    full = logits(model, data)
    weight = partial(LSQQuantizer, bits=4, granularity="per_group_16")
    activations = partial(MinMaxQuantizer, bits=3, granularity="per_token")
    both, alone = (prepare(copy.deepcopy(model), Scheme(weight=weight, input=own)) for own in (activations, None))
    quickly(both, data)
    quickly(alone, data)
    error = mean_error(both, data, full)
    for (_, layer), (_, own) in zip(quant_layers(both), quant_layers(alone), strict=True):
        layer.load_state_dict(own.state_dict(), strict=False)
    assert error < 0.85 * mean_error(both, data, full)


def test_static_activations_are_calibrated_later():
    static = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)
    model = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"], input=static))
    quickly(model, batches(2), steps=3)
    assert calibrate(model, batches(2)).training == model.training
    assert torch.isfinite(logits(model, batches(1))).all()


def test_pruned_weights_stay_zero():
    model = magnitude(prepare(textured(), Scheme(weight=QUANTIZERS["kmeans"])), (), sparsity=0.5)
    rounded = copy.deepcopy(model)
    full, fresh = logits(textured(), batches(seed=1)), batches(seed=1)
    quickly(model, batches(16))
    for name, layer in quant_layers(model):
        assert not layer.weight[~layer.weight_quantizer.mask].any(), name
    assert mean_error(model, fresh, full) < mean_error(rounded, fresh, full)


def test_a_block_that_stays_in_full_precision_is_passed():
    model = textured()
    before = copy.deepcopy(model)
    quickly(prepare(model, Scheme(weight=QUANTIZERS["lsq"], exclude=["*.layers.0.*"])), batches(2), steps=3)
    own, old = (m.model.layers for m in (model, before))
    assert torch.equal(own[0].mlp.down_proj.weight, old[0].mlp.down_proj.weight)
    assert not torch.equal(own[1].mlp.down_proj.weight, old[1].mlp.down_proj.weight)


def test_bfloat16_moves_too():
    model, fresh = textured().bfloat16(), batches(seed=1)
    full = logits(model, fresh)
    model = prepare(model, Scheme(weight=QUANTIZERS["lsq"]))
    rounded = mean_error(model, fresh, full)
    assert mean_error(quickly(model, batches(16)), fresh, full) < 0.8 * rounded


def test_it_follows_awq():
    model, fresh = textured(), batches(seed=1)
    full = logits(model, fresh)
    model = awq(prepare(model, Scheme(weight=QUANTIZERS["minmax"])), batches(), grid=4, clip=False)
    scaled = mean_error(model, fresh, full)
    assert mean_error(quickly(model, batches(16)), fresh, full) < 0.8 * scaled


class Killed(Exception):
    pass


@pytest.mark.parametrize("quantizer", ["lsq", "minmax", "kmeans"])
def test_a_killed_run_goes_on_where_it_was(quantizer, tmp_path, monkeypatch):
    model = prepare(textured(), Scheme(weight=QUANTIZERS[quantizer]))
    again = copy.deepcopy(model)
    whole = quickly(copy.deepcopy(model), batches(2), steps=4)
    rounded = []

    def dying_walk(*arguments, killed_at, **options):
        def until_killed(block):
            if block.index == killed_at:
                raise Killed
            rounded.append(block.index)
            arguments[2](block)

        walk(*arguments[:2], until_killed, *arguments[3:], **options)

    module = sys.modules["qat.transforms.autoround"]
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=1))
    with pytest.raises(Killed):
        quickly(model, batches(2), steps=4, folder=tmp_path)
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=None))
    quickly(again, batches(2), steps=4, folder=tmp_path)
    assert rounded == [0, 1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_checkpoint_of_it_is_loaded():
    model = quickly(prepare(textured(), Scheme(weight=QUANTIZERS["minmax"])), batches(2), steps=3)
    fresh = restructure(prepare(tiny_llama().eval(), Scheme(weight=QUANTIZERS["minmax"])), [quickly])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, batches(1)), logits(model, batches(1)))


def test_the_model_is_trained_further():
    model = quickly(prepare(textured(), Scheme(weight=QUANTIZERS["lsq"])), batches(2), steps=3)
    model.train()(**batches(1)[0]).loss.backward()
    assert all(layer.weight.grad.any() for _, layer in quant_layers(model))


BAD = {
    "steps": ({"steps": 0}, "steps is 0.*200"),
    "batch_size": ({"batch_size": 0}, "batch_size is 0"),
    "scale_reach": ({"scale_reach": 2.0}, "scale_reach is 2.0.*0.25"),
    "start": ({"start": "gtpq"}, "gtpq.*gptq"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_out_of_range_are_named(name):
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        autoround(prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"])), batches(1), **options)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"model\.layers\.0.*scalar grid"):
        quickly(prepare(tiny_llama(), Scheme(weight=partial(VectorQuantizer, bits=2))), batches(1))
    with pytest.raises(InputError, match="start=gptq"):
        quickly(gptq(prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"])), batches(1)), batches(1))
    with pytest.raises(InputError, match="scheme=w4"):
        quickly(tiny_llama(), batches(1))
    model = prepare(tiny_llama(), Scheme(weight=QUANTIZERS["lsq"]))
    with pytest.raises(InputError, match="calibration_batches"):
        quickly(copy.deepcopy(model), [])
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"model\.layers\.0.*(NaN|infinity)"):
        quickly(model, batches(1), steps=1)
