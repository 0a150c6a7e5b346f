"""Quantized gradients: the forward pass is untouched, and both products of the backward pass see the rounded one."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

import qat
from qat.errors import InputError
from qat.nn import quantize_grad
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, NoQuantizer, Quantizer, VectorQuantizer
from qat.transforms import quant_layers, quantizes_weights
from tests.conftest import tiny_llama
from tests.models import LANGUAGE_MODELS, small_cnn

CONFIGS = Path(__file__).parents[2] / "configs" / "quantizer"
TOKEN4 = partial(MinMaxQuantizer, bits=4, granularity="per_token")
LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")


@pytest.mark.parametrize("quantizer", [TOKEN4(shape=(6,)), NoQuantizer()], ids=["int4", "none"])
def test_forward_is_the_identity_and_backward_quantizes(quantizer):
    y, g = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    out = quantize_grad(y, quantizer)
    assert torch.equal(out, y)
    (found,) = torch.autograd.grad(out, y, g)
    assert torch.equal(found, quantizer(g))


@pytest.mark.parametrize("weight", [NoQuantizer, LSQ4], ids=["full weight", "int4 weight"])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor", "per_group_8"])
def test_dgrad_and_wgrad_see_the_quantized_gradient(weight, granularity):
    grad = partial(MinMaxQuantizer, bits=4, granularity=granularity)
    (layer,) = qat.prepare(nn.Sequential(nn.Linear(32, 16)), qat.Scheme(weight=weight, grad=grad))
    x, g = torch.randn(7, 32, requires_grad=True), torch.randn(7, 16)
    y = layer(x)
    y.backward(g)
    g_hat, w_hat = layer.grad_quantizer(g), layer.weight_quantizer(layer.weight)
    assert not torch.equal(g_hat, g)
    assert torch.equal(y, F.linear(x, w_hat, layer.bias))
    assert torch.allclose(x.grad, g_hat @ w_hat, atol=1e-6)
    assert torch.allclose(layer.bias.grad, g_hat.sum(0), atol=1e-6)
    if weight is NoQuantizer:
        assert torch.allclose(layer.weight.grad, g_hat.T @ x, atol=1e-6)


def test_the_channels_of_a_convolution_are_its_last_dimension():
    """A 1x1 convolution is a linear layer at each pixel, its quantized gradient included."""
    scheme = qat.Scheme(grad=TOKEN4)
    conv, linear = nn.Conv2d(8, 16, 1), nn.Linear(8, 16)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data
    (conv,), (linear,) = (qat.prepare(nn.Sequential(layer), scheme) for layer in (conv, linear))
    x, g = torch.randn(2, 8, 3, 3), torch.randn(2, 16, 3, 3)
    conv(x).backward(g)
    linear(x.movedim(1, -1)).backward(g.movedim(1, -1))
    assert torch.allclose(conv.weight.grad.flatten(1), linear.weight.grad, atol=1e-5)


def bias(factory, draws=1000):
    """By how many standard errors the mean dgrad and wgrad of a layer are off, and how far one draw is, at most."""
    (layer,) = qat.prepare(nn.Sequential(nn.Linear(8, 4)), qat.Scheme(grad=factory))
    x, g = torch.randn(16, 8, requires_grad=True), torch.randn(16, 4)
    found = [torch.autograd.grad(layer(x), (x, layer.weight), g) for _ in range(draws)]
    off, noise = 0.0, 0.0
    for draw, exact in zip(zip(*found, strict=True), (g @ layer.weight, g.T @ x), strict=True):
        draw = torch.stack(draw)
        error = (draw.mean(0) - exact).abs() / (draw.std(0) / draws**0.5).clamp(min=1e-6 * exact.abs().max())
        off, noise = max(off, error.max().item()), max(noise, (draw[0] - exact).abs().max().item())
    return off, noise


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ["grad_tensor", "grad_token", "grad_fp8"])
def test_stochastic_rounding_leaves_both_gradients_unbiased(name, bits):
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    if bits is not None:
        config = OmegaConf.merge(config, {"bits": bits} | ({"format": "fp4_e2m1"} if "format" in config else {}))
    off, noise = bias(instantiate(config))
    assert noise > 1e-3
    assert off < 5.5


def test_rounding_to_nearest_is_biased():
    off, _ = bias(partial(MinMaxQuantizer, bits=4, granularity="per_token"))
    assert off > 100


@pytest.mark.parametrize("build", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_gradients_alone_change_no_logit_and_vanish_when_converted(build):
    model, ids = build().eval(), torch.randint(0, 96, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    qat.prepare(model, qat.Scheme(grad=TOKEN4, head=True, embedding=True))
    kept = {name: id(p) for name, p in model.named_parameters()}
    assert torch.equal(model(ids, labels=ids).logits, before)
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(True for _ in quant_layers(model))
    assert not quantizes_weights(model)
    qat.convert(model)
    assert not any(True for _ in quant_layers(model))
    assert not any(isinstance(module, Quantizer | NoQuantizer) for module in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == kept
    assert torch.equal(model(ids).logits, before)


def test_plain_convolutions_come_back():
    plain, x = small_cnn(), torch.randn(1, 4, 12, 12)
    before, types = plain(x), [type(layer) for layer in plain]
    model = qat.convert(qat.prepare(plain, qat.Scheme(grad=TOKEN4)))
    assert [type(layer) for layer in model] == types
    assert torch.equal(model(x), before)


def test_a_layer_may_have_only_its_gradient_quantized_beside_packed_ones(tmp_path):
    rules = {"down": qat.Rule("*.down_proj", grad=TOKEN4)}
    model, ids = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, rules=rules)).eval(), torch.randint(0, 96, (1, 9))
    trained = model(ids).logits
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    assert type(loaded.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(loaded(ids).logits, trained)


def test_training_with_quantized_gradients_overfits_one_batch():
    model, ids = qat.prepare(tiny_llama(), qat.Scheme(grad=partial(TOKEN4, bits=8))), torch.randint(0, 96, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            partial(MinMaxQuantizer, granularity="per_tensor", dynamic=False),
            "cannot follow gradients, .* rounds at random .grad_token.",
        ),
        (partial(LSQQuantizer, granularity="per_tensor"), "cannot follow gradients"),
        (
            partial(VectorQuantizer, bits=2, granularity="per_tensor"),
            "vector codebooks .* are for weights; take grad_token",
        ),
        (partial(MinMaxQuantizer, granularity="per_channel"), "per_token, per_tensor or per_group_N, not per_channel"),
        (partial(MinMaxQuantizer, granularity="per_channel_-1"), "not per_channel_-1"),
        (partial(MinMaxQuantizer, granularity="per_group_48"), "grad of shape .64.: .* 48 does not divide 64"),
    ],
    ids=["static", "learned", "vectors", "per channel", "per feature", "odd group"],
)
def test_gradient_quantizers_that_cannot_work_are_refused(factory, message):
    with pytest.raises(InputError, match=message):
        qat.prepare(nn.Sequential(nn.Linear(64, 64)), qat.Scheme(grad=factory))


def test_activations_still_need_a_weight_quantizer_beside_gradients():
    with pytest.raises(InputError, match="no weight quantizer: give its rule a weight"):
        qat.prepare(nn.Sequential(nn.Linear(64, 8)), qat.Scheme(input=TOKEN4, grad=TOKEN4))
