"""Block-wise training of whole models."""

import copy
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms import Scheme, calibrate, prepare, quant_layers, reconstruct
from qat.transforms.blocks import walk
from qat.transforms.inputs import inputs_of, running_order
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS
from tests.transforms.test_autoround import QUANTIZERS, block_outputs, textured
from tests.transforms.texts import batches, logits, mean_error

quickly = partial(reconstruct, steps=40, batch_size=4)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_its_logits_on_fresh_data_are_nearer_than_rounded_ones(quantizer):
    model, fresh = textured(), batches(seed=1)
    full = logits(model, fresh)
    model = prepare(model, Scheme(weight=QUANTIZERS[quantizer]))
    rounded = mean_error(model, fresh, full)
    assert mean_error(quickly(model, batches(16)), fresh, full) < 0.8 * rounded


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_kind_of_model_goes_through_and_ships(name, unit):
    model = prepare(LANGUAGE_MODELS[name]().eval(), Scheme(weight=QUANTIZERS["minmax"]))
    quickly(model, batches(2), steps=3, unit=unit)
    trained = logits(model, batches(1))
    assert torch.equal(logits(qat.convert(model), batches(1)), trained)


def test_steps_are_those_of_adam_on_the_error_of_a_block():
    """Of the first block, whose inputs are those of the model, all batches in each step."""
    rates, steps = (1e-4, 1e-3), 5
    model = prepare(tiny_llama().eval(), Scheme(weight=QUANTIZERS["lsq"]))
    expected, data = copy.deepcopy(model), batches(1)
    targets = []
    walk(model, data, lambda block: targets.append((block.calls[0], block.targets[0])), "", with_targets=True)
    call, target = targets[0]
    quickly(model, data, steps=steps, lr=rates[0], quantizer_lr=rates[1])

    first = expected.model.layers[0]
    layers = [layer for _, layer in quant_layers(first)]
    weights, scales = [layer.weight for layer in layers], [layer.weight_quantizer.log_scale for layer in layers]
    optimizer = torch.optim.Adam([{"params": weights, "lr": rates[0]}, {"params": scales, "lr": rates[1]}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        output = first(call.hidden, *call.args, **call.kwargs)
        (output - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    for layer, (_, own) in zip(layers, quant_layers(model.model.layers[0]), strict=True):
        torch.testing.assert_close(own.weight, layer.weight, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(own.weight_quantizer.log_scale, layer.weight_quantizer.log_scale)


@pytest.mark.parametrize("lr", [1e-4, 0.0], ids=["weights too", "scales alone"])
def test_the_error_of_every_layer_falls(lr):
    """||Q(W') x - W x||^2 <= ||Q(W) x - W x||^2, with x as the trained layers before it make it."""
    model, data = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"])), batches(4)
    start = dict(quant_layers(copy.deepcopy(model)))
    quickly(model, data, unit="layer", lr=lr, quantizer_lr=1e-2)
    found = []

    def compare(block):
        for name, layer in running_order(block).items():
            first, x = start[f"{block.name}.{name}"], torch.cat(inputs_of(block, layer))
            assert torch.equal(layer.weight, first.weight) == (lr == 0)
            full = torch.nn.functional.linear(x, first.weight, first.bias)
            found.append([float((own(x) - full).square().mean()) for own in (layer, first)])

    walk(model, data, torch.no_grad()(compare), "")
    assert len(found) == len(start)
    assert all(trained <= rounded for trained, rounded in found)
    assert sum(trained < 0.95 * rounded for trained, rounded in found) > len(found) / 2


def test_layers_train_in_the_order_in_which_they_run():
    model, names = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"])), []
    walk(model, batches(1), lambda block: names.append(list(running_order(block))), "")
    attention = [f"self_attn.{role}_proj" for role in "qkvo"]
    assert names == [[*attention, *(f"mlp.{role}_proj" for role in ("gate", "up", "down"))]] * len(names)


def test_what_quantizers_of_activations_learn_is_learned_too():
    learned = partial(LSQQuantizer, bits=4, granularity="per_tensor")
    model = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"], input=learned))
    calibrate(model, batches(2))
    scales = {name: layer.input_quantizer.log_scale.detach().clone() for name, layer in quant_layers(model)}
    quickly(model, batches(2), steps=5)
    assert any(not torch.equal(scales[name], layer.input_quantizer.log_scale) for name, layer in quant_layers(model))


def test_a_block_that_gets_worse_stays_as_it_was():
    model = prepare(textured(), Scheme(weight=QUANTIZERS["lsq"]))
    before = copy.deepcopy(model.state_dict())
    quickly(model, batches(2), steps=2, lr=1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_block_gets_worse_on_the_data():
    model, data = textured(), batches(2)
    full = block_outputs(model, data)
    model = prepare(model, Scheme(weight=QUANTIZERS["kmeans"]))
    before = block_outputs(model, data)[0]
    quickly(model, data)
    after = block_outputs(model, data)[0]
    assert (after - full[0]).square().mean() < (before - full[0]).square().mean()


def test_steps_too_small_for_bfloat16_add_up():
    """Each is a hundredth of what a weight in bfloat16 can move by."""
    model = prepare(textured().to(torch.bfloat16), Scheme(weight=partial(MinMaxQuantizer, bits=3)))
    before = [layer.weight.detach().clone() for _, layer in quant_layers(model)]
    quickly(model, batches(2), steps=100, lr=2e-5)
    pairs = zip(before, (layer.weight for _, layer in quant_layers(model)), strict=True)
    assert all(not torch.equal(own, other) for own, other in pairs)


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_a_walk_that_was_killed_goes_on(tmp_path, unit):
    start = prepare(textured(), Scheme(weight=partial(KMeansQuantizer, bits=2)))
    model = partial(copy.deepcopy, start)
    expected, half = quickly(model(), batches(2), steps=3, unit=unit), model()
    second = half.model.layers[1]
    handle = second.register_forward_pre_hook(_interrupt(after=4))
    with pytest.raises(KeyboardInterrupt):
        quickly(half, batches(2), steps=3, folder=tmp_path, unit=unit)
    handle.remove()
    found = quickly(model(), batches(2), steps=3, folder=tmp_path, unit=unit)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def _interrupt(after):
    calls = []

    def hook(module, args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt

    return hook


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it is a whole number from 1 on"),
        ({"unit": "layers"}, "no unit 'layers'. Did you mean 'layer'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": -1}, "lr is -1; it lies between 0 and 1: set it to 0.0001"),
        ({"quantizer_lr": "fast"}, "quantizer_lr is fast"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        reconstruct(prepare(textured(), Scheme(weight=QUANTIZERS["lsq"])), batches(1), **options)


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(InputError, match="prepare it with scheme=w4"):
        reconstruct(textured(), batches(1))
