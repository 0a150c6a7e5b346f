"""Pruning of whole models: zeros stay zero through training, checkpoints and artifacts, on every grid that has one."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import qat
from qat.errors import InputError
from qat.nn import PackedLayer
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer, VectorQuantizer
from qat.transforms import Scheme, gptq, magnitude, prepare, quant_layers, sparsegpt, wanda
from qat.transforms.blocks import walk
from qat.transforms.masks import masks, sparsity
from qat.transforms.plain import full_precision
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, small_cnn, tiny_gpt_oss
from tests.transforms.test_gptq import Killed, batches, logits

METHODS = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
CONFIGS = Path(__file__).parents[2] / "configs" / "quantizer"
LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_16")


def weight_grids():
    """Every quantizer of the configs that suits a weight, in groups that suit the tiny model."""
    for file in sorted(CONFIGS.glob("*.yaml")):
        config = OmegaConf.load(file)
        name = str(config.get("granularity", ""))
        gradient = config.get("rounding") == "stochastic" or "token" in file.stem or "tensor" in file.stem
        if file.stem != "none" and not gradient and "per_channel_-1" not in name and "block_32" not in name:
            yield file.stem


def made(name):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    if str(config.get("granularity", "")).startswith("per_group"):
        config.granularity = "per_group_16" if name not in ("mxfp4", "mxfp6", "mxfp8") else "per_group_32"
    return instantiate(config)


def pruned_codes(model):
    """Of a converted model, the weights by name."""
    return {name: m.weights()["weight"].dequantize() for name, m in model.named_modules() if isinstance(m, PackedLayer)}


def train(model, steps=3, rate=1e-2):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.1)
    for batch in batches(steps, seed=3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def kept(model):
    return {name: layer.weight_quantizer.mask.clone() for name, layer in quant_layers(model)}


@pytest.mark.parametrize("grid", weight_grids())
def test_zeros_stay_zero_on_every_grid_through_training_saving_and_loading(grid, tmp_path):
    model = prepare(tiny_llama(intermediate_size=96), Scheme(weight=made(grid)))
    if any(not layer.weight_quantizer.holds_zero for _, layer in quant_layers(model)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(InputError, match=r"model\.layers\.0.*no zero.*scheme.weight=lsq, ternary_lsq or kmeans"):
            magnitude(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    for _, layer in quant_layers(model):
        layer.weight_quantizer.initialize(layer.weight)
    train(magnitude(model))
    own = kept(model)
    for name, layer in quant_layers(model):
        assert (layer.weight_quantizer(layer.weight)[~own[name]] == 0).all()
        assert (layer.weight[own[name]] != 0).float().mean() > 0.99
    trained = logits(model, batches(1))
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    assert torch.equal(logits(loaded, batches(1)), trained)
    for name, weight in pruned_codes(loaded).items():
        assert (weight[~own[name]] == 0).all()
        assert weight[own[name]].any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_half_in_its_pattern(method, pattern):
    model = prepare(tiny_llama(), Scheme(weight=LSQ4))
    METHODS[method](model, batches(2), pattern=pattern)
    assert sparsity(model) == 0.5
    assert len(list(masks(model))) == 14
    weights = pruned_codes(qat.convert(model))
    assert len(weights) == 14
    for weight in weights.values():
        if pattern != "unstructured":
            n, m = map(int, pattern.split(":"))
            assert ((weight.view(-1, m) != 0).sum(1) <= n).all()
        assert (weight == 0).float().mean() >= 0.5


@pytest.mark.parametrize("quantizer", ["none", "int4", "kmeans3"])
def test_each_method_keeps_the_logits_better_than_the_one_before(quantizer):
    quantizers = {"none": None, "int4": LSQ4, "kmeans3": partial(KMeansQuantizer, bits=3)}
    model = tiny_llama().eval()
    with torch.no_grad():  # a few features far larger than the others
        for block in model.model.layers:
            block.input_layernorm.weight[::9] *= 8
            block.post_attention_layernorm.weight[::9] *= 8
    full, errors = logits(model, batches(seed=1)), {}
    for name, method in METHODS.items():
        own = copy.deepcopy(model)
        own = own if quantizer == "none" else prepare(own, Scheme(weight=quantizers[quantizer]))
        errors[name] = (logits(method(own, batches()), batches(seed=1)) - full).square().mean()
    assert errors["sparsegpt"] < 0.95 * errors["wanda"] < 0.95 * 0.95 * errors["magnitude"]


def test_a_model_in_full_precision_trains_with_zeros_and_becomes_plain_again(tmp_path):
    model = magnitude(tiny_llama(), pattern="2:4")
    own = kept(model)
    train(model)
    trained = logits(model, batches(1))
    qat.convert(model)
    assert not list(quant_layers(model))
    assert torch.equal(logits(model, batches(1)), trained)
    for name, mask in own.items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), batches(1)), trained)


def test_pruned_weights_get_a_gradient_only_when_asked():
    for dense in (False, True):
        for weight in (None, LSQ4, partial(KMeansQuantizer, bits=3), partial(MinMaxQuantizer, bits=4)):
            model = tiny_llama()
            model = magnitude(model if weight is None else prepare(model, Scheme(weight=weight)))
            for _, layer in quant_layers(model):
                layer.weight_quantizer.dense_gradient = dense
            model(**batches(1)[0]).loss.backward()
            for name, layer in quant_layers(model):
                assert layer.weight.grad[~layer.weight_quantizer.mask].any() == dense, name
                assert layer.weight.grad[layer.weight_quantizer.mask].any(), name


@pytest.mark.parametrize("weight", [LSQ4, partial(KMeansQuantizer, bits=2), partial(MinMaxQuantizer, bits=3)])
@pytest.mark.parametrize("dense", [False, True])
def test_the_layer_that_keeps_codes_has_the_gradients_of_the_definition(weight, dense):
    """The same values and gradients as masking, fake-quantizing and multiplying one after the other."""
    model = prepare(torch.nn.Sequential(torch.nn.Linear(32, 16)), Scheme(weight=weight))
    (_, layer), x = next(quant_layers(magnitude(model))), torch.randn(8, 32)
    quantizer = layer.weight_quantizer
    quantizer.dense_gradient = dense
    found = []
    for forward in (layer, lambda x: torch.nn.functional.linear(x, quantizer(layer.weight), layer.bias)):
        model.zero_grad()
        y = forward(x)
        y.square().sum().backward()
        found.append([y, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [None, LSQ4], ids=["full precision", "int4"])
def test_a_checkpoint_carries_the_masks(weight):
    def fresh():
        return tiny_llama() if weight is None else prepare(tiny_llama(), Scheme(weight=weight))

    model = train(magnitude(fresh()))
    state, other = model.state_dict(), fresh()
    if weight is None:
        from qat.transforms.masks import hold_masks_of

        hold_masks_of(other, state)
    other.load_state_dict(state)
    assert torch.equal(logits(other.eval(), batches(1)), logits(model, batches(1)))
    assert sparsity(other) == 0.5


def test_a_tied_weight_has_one_mask():
    model = prepare(tiny_llama(), Scheme(weight=LSQ4, head=True))
    magnitude(model, head=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight_quantizer.mask is head.weight_quantizer.mask is not None
    assert len(list(masks(model))) == 15
    train(model)
    trained = logits(model, batches(1))
    assert torch.equal(logits(qat.convert(model), batches(1)), trained)
    assert (model.get_input_embeddings().weight.dequantize() == 0).float().mean() >= 0.5


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_model_is_pruned_and_ships(method, name):
    model = LANGUAGE_MODELS[name]().eval()
    prepare(model, Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_group_16")))
    METHODS[method](model, batches(1), pattern="2:4")
    assert sparsity(model) == 0.5
    pruned = logits(model, batches(1))
    assert torch.equal(logits(qat.convert(model), batches(1)), pruned)


def test_experts_that_are_stored_transposed_are_pruned_along_their_inputs():
    model = magnitude(tiny_gpt_oss(), pattern="2:4")
    experts = model.model.layers[0].mlp.experts
    weight = experts.gate_up_proj
    assert ((weight.mT.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_convolutions_are_pruned():
    model = magnitude(prepare(small_cnn(), Scheme(weight=partial(MinMaxQuantizer, bits=4))), sparsity=0.25)
    assert sparsity(model) == pytest.approx(0.25, abs=0.01)
    x = torch.randn(2, 4, 12, 12)
    pruned = model(x)
    assert torch.allclose(qat.convert(model)(x), pruned)


def test_gptq_after_wanda_leaves_the_zeros_and_betters_rounding():
    model = tiny_llama().eval()
    wanda(prepare(model, Scheme(weight=partial(MinMaxQuantizer, bits=3, granularity="per_group_16"))), batches())
    with full_precision(model):
        full = logits(model, batches(seed=1))
    own, rounded = kept(model), (logits(model, batches(seed=1)) - full).square().mean()
    gptq(model, batches())
    assert (logits(model, batches(seed=1)) - full).square().mean() < 0.95 * rounded
    for name, layer in quant_layers(model):
        assert torch.equal(layer.weight_quantizer.mask, own[name])
        assert (layer.weight[~own[name]] == 0).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_killed_run_goes_on_where_it_was(method, tmp_path, monkeypatch):
    model = prepare(tiny_llama(), Scheme(weight=LSQ4, exclude="*.q_proj"))
    again, whole = copy.deepcopy(model), METHODS[method](copy.deepcopy(model), batches(2))
    done = []

    def dying_walk(*arguments, killed_at):
        def until_killed(block):
            if block.index == killed_at:
                raise Killed
            done.append(block.index)
            arguments[2](block)

        walk(*arguments[:2], until_killed, *arguments[3:])

    module = sys.modules["qat.transforms.prune"]
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=1))
    with pytest.raises(Killed):
        METHODS[method](model, batches(2), folder=tmp_path)
    monkeypatch.setattr(module, "walk", partial(dying_walk, killed_at=None))
    METHODS[method](again, batches(2), folder=tmp_path)
    assert done == [0, 1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_excluded_layers_stay_dense():
    model = wanda(prepare(tiny_llama(), Scheme(weight=LSQ4)), batches(1), exclude=["*.down_proj", "*.0.*"])
    for name, layer in quant_layers(model):
        assert (layer.weight_quantizer.mask is None) == (name.endswith("down_proj") or ".0." in name)


def test_layers_that_the_scheme_leaves_out_are_pruned_too():
    model = magnitude(prepare(tiny_llama(), Scheme(weight=LSQ4, exclude="*.down_proj")))
    assert len(list(masks(model))) == 14
    qat.convert(model)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert (model.model.layers[0].mlp.down_proj.weight == 0).float().mean() == 0.5


def test_an_unpruned_model_holds_and_stores_nothing_more():
    model = prepare(tiny_llama(), Scheme(weight=LSQ4))
    assert not any("mask" in name for name in model.state_dict())
    assert sparsity(model) == 0
    assert all(layer.weight_quantizer.masked(layer.weight) is layer.weight for _, layer in quant_layers(model))


def test_bad_input_is_named():
    for options, message in (
        ({"exclude": "*.nothing"}, r"exclude '\*.nothing' matches no layer that is pruned"),
        ({"exclude": "*"}, "no layer to prune: exclude fewer"),
        ({"pattern": "2:4", "sparsity": 0.7}, "set sparsity=0.5"),
        ({"scope": "column"}, "set scope=row"),
    ):
        with pytest.raises(InputError, match=message):
            magnitude(tiny_llama(), **options)
    with pytest.raises(InputError, match="calibration_batches"):
        wanda(tiny_llama(), [])
    with pytest.raises(InputError, match="list of blocks"):
        wanda(torch.nn.Sequential(torch.nn.Linear(16, 16)), batches(1))
    with pytest.raises(InputError, match="no zero there: take"):
        sparsegpt(prepare(tiny_llama(), Scheme(weight=partial(VectorQuantizer, bits=2))), batches(1))
    binary = partial(TableQuantizer, family="binary", bits=1, rule="absmean")
    with pytest.raises(InputError, match="no zero there: take"):
        magnitude(prepare(tiny_llama(), Scheme(weight=binary)))
