"""Generation attends to the codes of its cache as they are stored."""

import pytest
import torch

from qat.nn import attention, kv_cache
from qat.nn.deferred import deferred, stored_behind
from qat.nn.kv_cache import QuantizedCache
from qat.transforms.kv import store_kv
from tests.nn.kv_models import in_parts, quantized, tokens, whole

greedy = {"do_sample": False, "max_new_tokens": 12}
DECODED = ["int8", "int4", "int4_window5", "int2", "kivi4", "kivi4_window8", "blocks_of_both", "static"]
OTHERS = ["nf4", "fp8", "mxfp4", "keys_only", "values_only", "learned"]


@pytest.fixture
def calls(monkeypatch):
    """The shapes of q of every call of the operator."""
    found, own = [], attention.attention_decode

    def counted(q, *arguments):
        found.append(tuple(q.shape))
        return own(q, *arguments)

    monkeypatch.setattr(attention, "attention_decode", counted)
    return found


def left_padded(length=15):
    ids = tokens(length=length)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    return ids, mask


@pytest.mark.parametrize("layout", DECODED)
def test_greedy_tokens_are_those_of_dequantized_keys_and_values(layout, calls, monkeypatch):
    model, (ids, mask) = quantized(layout), left_padded()
    found = model.generate(ids, attention_mask=mask, **greedy)
    assert calls[0] == (2, 4, 1, 16)
    assert len(calls) == 2 * 11  # layers, and tokens after the first
    monkeypatch.setattr(attention, "_decodes", lambda *_: False)
    assert torch.equal(model.generate(ids, attention_mask=mask, **greedy), found)
    monkeypatch.setattr(kv_cache, "deferred", None)
    monkeypatch.setattr(kv_cache.QuantizedLayer, "_hands_over", lambda *_: False)
    assert torch.equal(model.generate(ids, attention_mask=mask, **greedy), found)
    assert len(calls) == 22


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_stored_model_decodes_too(kind, calls):
    model, ids = store_kv(quantized("int4", kind)), tokens(length=9)
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))
    assert len(calls) == 22


@pytest.mark.parametrize("layout", OTHERS)
def test_other_layouts_are_dequantized(layout, calls):
    model, ids = quantized(layout), tokens(length=9)
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))
    assert not calls


def test_a_few_tokens_at_a_time(calls):
    model, ids = quantized("int4"), tokens()
    logits, _ = in_parts(model, ids, [7, 3, 8, 9, 13])
    assert torch.allclose(logits, whole(model, ids), atol=1e-5)
    assert [shape[2] for shape in calls] == [3, 3, 8, 8]


def test_queries_that_see_tokens_differently_are_not_decoded(calls):
    model, ids = quantized("kivi4_window8"), tokens()
    logits, _ = in_parts(model, ids, [30, 3, 7])
    assert torch.allclose(logits, whole(model, ids), atol=1e-5)
    assert not calls


def test_eager_attention_still_returns_its_weights(calls):
    model, ids = quantized("int4", attn_implementation="eager"), tokens(length=9)
    cache = QuantizedCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        out = model(ids[:, :1], past_key_values=cache, output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 1, 10)
    assert not calls


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"s_aux": torch.ones(4)},
        {"sliding_window": 4},
        {"position_bias": torch.ones(1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_operator_lacks_is_left_to_the_model(options):
    q, module = torch.randn(2, 4, 1, 16), torch.nn.Module()
    assert attention._decodes(None, module, q, None, {"scaling": 0.5, "dropout": 0.0})
    assert not attention._decodes(None, module, q, None, options)


def test_gradients_of_queries_need_the_values_too(calls):
    model, ids = quantized("int4"), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.self_attn.q_proj" in name)
    cache = QuantizedCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert len(calls) == 1  # of the first layer, which nothing is learned in


def test_masks_of_single_heads_are_left_to_the_model():
    q, module = torch.randn(2, 4, 2, 16), torch.nn.Module()
    assert attention._decodes(None, module, q, torch.ones(2, 1, 2, 9, dtype=torch.bool), {})
    assert not attention._decodes(None, module, q, torch.ones(2, 4, 2, 9, dtype=torch.bool), {})
    assert not attention._decodes(None, module, q, None, {"is_causal": False})


def test_what_is_handed_over_takes_no_memory_and_is_nothing_to_compute_with():
    model, ids = quantized("int4"), tokens()
    _, cache = in_parts(model, ids, [40])
    stored = cache.layers[0].stored_keys
    key = deferred(stored)
    assert key.shape == (2, 2, 40, 16)
    assert key.untyped_storage().nbytes() == key.element_size()
    assert key.isnan().all()
    assert stored_behind(key, key) == (stored, stored)
    assert stored_behind(key, key.clone()) is None


def test_gradients_need_the_values():
    model, ids = quantized("int4"), tokens()
    cache = QuantizedCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0
