"""Rotated models: the same function, without outliers."""

import copy
from functools import cache, partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.quantizers import LSQQuantizer, MinMaxQuantizer
from qat.transforms import Scheme, calibrate, gptq, neighbours, prepare, quant_layers, restructure, rotate, uncalibrated
from qat.transforms.learned_rotation import learned_rotation
from qat.transforms.plain import full_precision
from qat.transforms.stream import find_stream
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, tiny_gemma, tiny_gpt2
from tests.transforms.test_neighbours import MODELS
from tests.transforms.texts import batches, exact, logits, mean_error, with_outliers

INT4 = partial(MinMaxQuantizer, bits=4)
TOKEN4 = partial(MinMaxQuantizer, bits=4, granularity="per_token")
STATIC8 = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False)
ROTATING = [name for name in MODELS if name != "gemma3"]


def loud(model):
    """Two channels of the residual stream are large, as in large models."""
    with_outliers(model, factor=1)
    model.get_input_embeddings().weight.data[:, [3, 17]] *= 40
    return model.eval()


def differs(model, data, full):
    """By how much logits differ from `full`, as a share of the largest; RMSNorms compute in float32."""
    return float((logits(model, data) - full).abs().max() / full.abs().max())


def inputs_of(model, ending):
    """What the first layer called `*ending` is given in full precision, `[tokens, features]`."""
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith(ending))
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with full_precision(model):
        logits(model, batches(2))
    hook.remove()
    return torch.cat(seen)


def kurtosis(x):
    """Mean over tokens of the fourth moment over the squared second, 3 for normal values."""
    centered = x - x.mean(-1, keepdim=True)
    return float((centered**4).mean(-1).div((centered**2).mean(-1) ** 2).mean())


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("name", ROTATING)
def test_the_function_stays_and_the_weights_do_not(name, kind):
    model = prepare(exact(with_outliers(MODELS[name]())), Scheme(weight=INT4))
    before = {name: layer.weight.detach().clone() for name, layer in quant_layers(model) if hasattr(layer, "weight")}
    with full_precision(model):
        full = logits(model, batches(1))
        rotate(model, kind=kind)
        assert differs(model, batches(1), full) < (1e-12 if "gpt2" in name or "neox" in name else 1e-5)
    layers = dict(quant_layers(model))
    assert not [name for name, weight in before.items() if torch.equal(layers[name].weight, weight)]


def test_experts_take_part():
    model = prepare(exact(LANGUAGE_MODELS["gpt-oss"]()), Scheme(weight=INT4))
    experts = model.model.layers[0].mlp.experts
    names = ("gate_up_proj", "down_proj", "down_proj_bias")
    experts.down_proj_bias.data.normal_()
    before = [getattr(experts, name).detach().clone() for name in names]
    with full_precision(model):
        full = logits(model, batches(1))
        assert differs(rotate(model), batches(1), full) < 1e-5
    assert not any(torch.equal(getattr(experts, name), old) for name, old in zip(names, before, strict=True))


def test_outliers_of_channels_are_gone():
    model = prepare(loud(tiny_llama()), Scheme(weight=INT4))
    loud_inputs = inputs_of(model, "0.self_attn.q_proj")
    rotate(model)
    calm = inputs_of(model, "0.self_attn.q_proj")
    assert kurtosis(loud_inputs) > 10
    assert kurtosis(calm) < 4


# What reads the stream is rotated; the layers at the end of a branch are given something else, so they stay out of it.
@pytest.mark.parametrize(("name", "ends"), [("llama, tied", ["*o_proj", "*down_proj"]), ("gpt2", ["*c_proj"])])
def test_four_bit_activations_cost_less(name, ends):
    model, fresh = loud(LANGUAGE_MODELS[name]()), batches(2, seed=1)
    full = logits(model, fresh)
    model = prepare(model, Scheme(weight=partial(MinMaxQuantizer, bits=8), input=TOKEN4, exclude=ends))
    before = mean_error(model, fresh, full)
    assert mean_error(rotate(model), fresh, full) < 0.5 * before


def test_values_are_rotated_within_their_heads():
    model = prepare(tiny_llama(), Scheme(weight=INT4)).eval()
    values, other = (copy.deepcopy(model) for _ in range(2))
    rotate(values)
    rotate(other, heads=False)
    ours, theirs = (m.model.layers[0].self_attn.v_proj.weight.view(2, 16, 64) for m in (values, other))
    assert not torch.allclose(ours, theirs)
    assert torch.allclose(ours.mT @ ours, theirs.mT @ theirs, atol=1e-5)


@pytest.mark.parametrize("scheme", [{}, {"head": True}, {"embedding": True}], ids=str)
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "qwen3 moe"])
def test_it_ships_to_the_bit(name, scheme, tmp_path):
    model = prepare(loud(LANGUAGE_MODELS[name]()), Scheme(weight=INT4, input=STATIC8, **scheme))
    calibrate(rotate(model), batches(2))
    trained = logits(model, batches(1))
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    assert torch.equal(logits(loaded, batches(1)), trained)
    assert not loaded.config.tie_word_embeddings


def test_it_is_trained_further():
    model = rotate(prepare(tiny_llama(), Scheme(weight=partial(LSQQuantizer, bits=4), head=True)))
    model.train()(**batches(1)[0]).loss.backward()
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is not embedding.weight
    assert head.weight_quantizer is not embedding.weight_quantizer
    assert head.weight.grad.any()
    assert embedding.weight.grad.any()


def test_gptq_and_static_activations_go_on_from_there():
    model, fresh = loud(tiny_llama()), batches(2, seed=1)
    full = logits(model, fresh)
    model = rotate(prepare(model, Scheme(weight=partial(LSQQuantizer, bits=3), input=STATIC8)))
    assert len(uncalibrated(model)) == len(list(quant_layers(model)))
    rounded = mean_error(calibrate(copy.deepcopy(model), batches()), fresh, full)
    assert mean_error(calibrate(gptq(model, batches()), batches()), fresh, full) < 0.8 * rounded


@pytest.mark.parametrize("transform", [partial(rotate, seed=1), gptq], ids=["rotate", "gptq"])
def test_a_checkpoint_finds_its_place(transform):
    scheme = Scheme(weight=INT4, head=True)
    model = transform(prepare(with_outliers(tiny_llama()).eval(), scheme), batches(1))
    fresh = prepare(tiny_llama().eval(), scheme, initialize=False)
    assert not takes(fresh, model)
    assert takes(restructure(fresh, [transform]), model)


def takes(fresh, model):
    """Whether `fresh` computes what `model` does once it has its state."""
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError:
        return False
    return torch.equal(logits(fresh, batches(1)), logits(model, batches(1)))


QUANTIZED = {
    "weights": Scheme(weight=partial(MinMaxQuantizer, bits=3)),
    "static scales": Scheme(weight=partial(LSQQuantizer, bits=3), input=STATIC8),
}


def ascending():
    """Texts that can be learned: tokens in their order."""
    return [dict.fromkeys(("input_ids", "labels"), batch["input_ids"].sort(1).values) for batch in batches(4)]


@cache
def trained(name):
    """A model that knows some of them, with large channels: a loss of quantization is there to be lowered."""
    model = loud(LANGUAGE_MODELS[name]())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in ascending() * 12:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def loss(model):
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in ascending())


@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("scheme", QUANTIZED.values(), ids=QUANTIZED)
def test_learning_lowers_the_loss_and_leaves_the_function(name, scheme):
    model = prepare(copy.deepcopy(trained(name)), scheme)
    with full_precision(model):
        full = logits(model, batches(1))
    fixed, learned = rotate(copy.deepcopy(model)), rotate(model, ascending(), steps=25)
    with full_precision(model):
        assert differs(model, batches(1), full) < 1e-3
    losses = [loss(calibrate(rotated, ascending())) for rotated in (fixed, learned)]
    assert losses[1] < losses[0]


def test_learning_changes_no_weight_on_its_way():
    model = rotate(prepare(loud(tiny_llama()), QUANTIZED["weights"]))
    stream, before = find_stream(model), copy.deepcopy(model.state_dict())
    matrix = learned_rotation(model, stream, ascending(), steps=2, rate=1.5)
    assert torch.allclose(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), atol=1e-12)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_identity_is_kept_where_nothing_better_is_found():
    model = rotate(prepare(loud(tiny_llama()), QUANTIZED["weights"]))
    matrix = learned_rotation(model, find_stream(model), ascending(), steps=1, rate=1e-12)
    assert torch.equal(matrix, torch.eye(64, dtype=torch.float64))


def test_a_model_in_full_precision_rotates_too():
    model = exact(with_outliers(tiny_llama()))
    full = logits(model, batches(1))
    assert differs(rotate(model), batches(1), full) < 1e-5


def test_half_precision_is_proven_too():
    model = with_outliers(tiny_llama(), factor=1).to(torch.bfloat16).eval()
    full = logits(model, batches(1)).float()
    rotated = logits(rotate(model), batches(1)).float()
    assert (rotated - full).norm() < 0.1 * full.norm()


def test_what_cannot_be_proven_is_refused_and_left_as_it_was():
    model = prepare(tiny_gemma().eval(), Scheme(weight=INT4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"Gemma3.*rotate"):
        rotate(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_that_reads_the_stream_without_a_norm_is_found_out():
    model = prepare(tiny_llama().eval(), Scheme(weight=INT4))
    layer = model.model.layers[1]
    layer.mlp = Reading(layer.mlp)
    with pytest.raises(InputError, match="rotate"):
        rotate(model)


class Reading(nn.Module):
    """Something that is not the same in other axes."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + x.sin()


def test_bad_input_is_named():
    model = prepare(tiny_gpt2(), Scheme(weight=INT4))
    with pytest.raises(InputError, match="hadamard"):
        rotate(model, kind="hadamad")
    with pytest.raises(InputError, match="calibration_batches"):
        rotate(model, [], steps=1)
    with pytest.raises(InputError, match="labels"):
        rotate(model, [{"input_ids": batches(1)[0]["input_ids"]}], steps=1)
    with pytest.raises(InputError, match="steps=0"):
        rotate(tiny_llama(), batches(1), steps=1)
    model.transformer.ln_f.weight.data[0] = 0
    model.transformer.ln_f.bias.data[0] = 1
    with pytest.raises(InputError, match="gain of zero"):
        rotate(model)
    assert neighbours(model)
