from functools import partial

import pytest
import torch

import qat
from qat.kernels import ops
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, NVFP4Quantizer
from qat.transforms.step_codes import ModelStepCodes
from tests.conftest import tiny_llama

WEIGHTS = {
    "lsq": partial(LSQQuantizer, bits=3, granularity="per_group_16"),
    "minmax": partial(MinMaxQuantizer, bits=4),
    "kmeans": partial(KMeansQuantizer, bits=3),
    "nvfp4": NVFP4Quantizer,
}
INPUT8 = partial(MinMaxQuantizer, bits=8, granularity="per_token", scale_dtype="float32")
PRODUCTS = {
    "minmax": partial(MinMaxQuantizer, bits=8, scale_dtype="float32"),
    "lsq": partial(LSQQuantizer, bits=8),
    "lsq, per tensor": partial(LSQQuantizer, bits=8, granularity="per_tensor"),
}


@pytest.fixture
def counted(monkeypatch):
    """How often codes were found."""
    calls, quantize = [], ops.quantize_view
    monkeypatch.setattr(ops, "quantize_view", lambda *arguments: calls.append(1) or quantize(*arguments))
    return calls


def prepared(name):
    torch.manual_seed(0)
    return qat.prepare(tiny_llama(), qat.Scheme(weight=WEIGHTS[name])).train()


def trained(model, codes=None, checkpointing=False):
    """The state after two steps of two micro-batches each."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        for part in range(2):
            ids = torch.arange(32).view(2, 16) + 5 * step + part
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if codes is not None:
            codes.renew()
    return model.state_dict()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_training_ends_with_the_same_bits(name, checkpointing, counted):
    expected = trained(prepared(name), checkpointing=checkpointing)
    model, before = prepared(name), len(counted)
    found = trained(model, ModelStepCodes(model), checkpointing)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    layers = 2 * 7
    passes = 2 * 2 * (2 if checkpointing else 1)
    assert before == passes * layers
    assert len(counted) - before == 2 * layers  # once a step


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_codes_take_those_of_the_step(name):
    """Training ends with the same bits, and between two steps all passes multiply the same memory."""

    def model_of_products():
        torch.manual_seed(0)
        return qat.prepare(tiny_llama(), qat.Scheme(weight=PRODUCTS[name], input=INPUT8, compute="int8")).train()

    expected, model = trained(model_of_products()), model_of_products()
    codes = ModelStepCodes(model)
    found = trained(model, codes)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    layer = model.model.layers[0].mlp.up_proj
    first, again = (layer.weight_quantizer.codes(layer.weight, stored=True)[0] for _ in range(2))
    assert first.shape == layer.weight.shape
    assert first.data_ptr() == again.data_ptr()
    codes.renew()
    assert layer.weight_quantizer.codes(layer.weight, stored=True)[0].data_ptr() != first.data_ptr()


def test_evaluation_looks_at_nothing_that_is_kept():
    model = prepared("lsq")
    ModelStepCodes(model)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    kept = model.eval()(ids).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)  # as an average of weights is swapped in
        assert not torch.equal(model(ids).logits, kept)


def test_a_new_mask_or_new_scales_find_new_codes(counted):
    model = prepared("lsq")
    codes, layer, x = ModelStepCodes(model), model.model.layers[0].mlp.up_proj, torch.randn(1, 64)
    for change in (
        lambda: None,
        lambda: layer.weight_quantizer.set_mask(torch.rand_like(layer.weight) > 0.5),
        lambda: layer.weight_quantizer.initialize(layer.weight),
        codes.renew,
    ):
        change()
        before = len(counted)
        layer(x), layer(x)
        assert len(counted) == before + 1


def test_refreshed_codebooks_find_new_codes(counted):
    model = prepared("kmeans")
    ModelStepCodes(model)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(1, 64)
    layer(x)
    before = len(counted)
    layer.weight_quantizer.refresh(layer.weight)
    layer(x)
    assert len(counted) == before + 1


def test_afterwards_nothing_is_kept():
    model = prepared("minmax")
    ModelStepCodes(model).stop()
    assert all(m.step_codes is None for m in model.modules() if isinstance(m, MinMaxQuantizer))
