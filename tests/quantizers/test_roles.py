"""The contract beyond weights: every file of configs/quantizer/ in every role is served to the bit, or refused."""

import re
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import qat
from qat.errors import InputError
from qat.nn.kv_cache import QuantizedCache
from qat.quantizers import LSQQuantizer
from qat.transforms import KVCache, quant_layers
from tests.conftest import tiny_llama
from tests.quantizers.test_contract import quantizers

WEIGHT = partial(LSQQuantizer, bits=4, granularity="per_group_64")
DYNAMIC = {
    "af4",
    "apot",
    "binary",
    "fp4",
    "fp6",
    "minmax",
    "minmax_asymmetric",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nf4",
    "pot",
}
TOKENS = {"fp8_token", "kv_token", "minmax_token"}
STATIC = {"fp8_static", "minmax_static"}
# As they stand in their files; others are refused. With granularity=per_tensor the learned ones serve activations too.
SERVED = {
    "input": DYNAMIC | TOKENS | STATIC | {"ternary"},
    "output": DYNAMIC | TOKENS | STATIC | {"ternary"},
    "key": DYNAMIC | TOKENS | STATIC | {"kv_channel"},
    "value": DYNAMIC | TOKENS | STATIC | {"kv_channel"},
    "grad": DYNAMIC | TOKENS | {"grad_fp8", "grad_tensor", "grad_token", "nf4_double", "nvfp4", "ternary"},
}
LEARNED = ("lsq", "lsq_plus", "stretched", "ternary_lsq", "kmeans", "kmeans_entropy", "kmeans_nf4")
MEND = re.compile(r"\b(take|Take|set|Set|needs)\b")


@pytest.fixture(params=list(quantizers()))
def path(request):
    return request.param


def tokens(count=40):
    return torch.randint(0, 96, (2, count), generator=torch.Generator().manual_seed(0))


def prepared(role, factory):
    """A model whose weights have four bits, with `factory` in one role more; calibrated."""
    cache = KVCache(**{role: factory}) if role in ("key", "value") else None
    others = {} if cache else {role: factory}
    model = tiny_llama(num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    qat.prepare(model, qat.Scheme(weight=WEIGHT, kv=cache, **others)).eval()
    return qat.calibrate(model, [{"input_ids": tokens()}])


def served(role, path, **overrides):
    """The model, or None where the role is refused with a mend."""
    factory = instantiate(OmegaConf.merge(OmegaConf.load(path), overrides))
    refusals = []
    try:
        return prepared(role, factory)
    except InputError as error:
        refusals.append(str(error))
    assert MEND.search(refusals[0]), refusals[0]
    return None


@pytest.mark.parametrize("role", ["input", "output"])
def test_activations(role, path, tmp_path):
    """What trains, what is stored and what is loaded give the same logits; a layer takes no token at all, too."""
    model = served(role, path)
    assert (model is not None) == (path.stem in SERVED[role])
    model = served(role, path, granularity="per_tensor") if path.stem in LEARNED else model
    if model is None:
        return
    assert_ships(model, tmp_path)


def assert_ships(model, folder):
    trained = model(tokens()).logits
    _, layer = next(quant_layers(model))
    assert layer(torch.empty(0, layer.in_features)).shape == (0, layer.out_features)
    loaded = qat.load(qat.save(qat.convert(model), folder / "artifact"))
    assert torch.equal(loaded(tokens()).logits, trained)
    _, packed = next((n, m) for n, m in loaded.named_modules() if hasattr(m, "input_quantizer"))
    assert packed(torch.empty(0, packed.in_features)).shape == (0, packed.out_features)


@pytest.mark.parametrize("role", ["key", "value"])
def test_keys_and_values(role, path, tmp_path):
    """A cache that grows in parts gives the logits of training, before and after the model is stored."""
    model = served(role, path)
    assert (model is not None) == (path.stem in SERVED[role])
    model = served(role, path, granularity="per_tensor") if path.stem in LEARNED else model
    if model is None:
        return
    trained = model(tokens()).logits
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
    assert torch.equal(loaded(tokens()).logits, trained)
    cache = QuantizedCache(loaded)
    parts = [loaded(part, past_key_values=cache, use_cache=True).logits for part in tokens().split([33, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), trained, rtol=1e-4, atol=1e-5)


def test_gradients(path):
    """The layer's backward products see the gradient that the quantizer gives, straight from its forward."""
    model = served("grad", path)
    assert (model is not None) == (path.stem in SERVED["grad"])
    if model is None:
        return
    _, layer = next(quant_layers(model))
    x, g = torch.randn(6, layer.in_features, requires_grad=True), torch.randn(6, layer.out_features)
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight_quantizer(layer.weight)))
    torch.manual_seed(0)
    (dx,) = torch.autograd.grad(y, x, g)
    torch.manual_seed(0)
    expected = layer.grad_quantizer(g) @ layer.weight_quantizer(layer.weight)
    torch.testing.assert_close(dx, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(torch.autograd.grad(layer(x[:0]).sum(), layer.weight)[0]).all()
