import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.nn import StoredActivation
from qat.nn.kv_quantizer import kv_layers
from qat.numerics.formats import IntFormat
from qat.numerics.qtensor import QParams
from qat.quantizers import (
    LSQQuantizer,
    MinMaxQuantizer,
    NoQuantizer,
    NVFP4Quantizer,
    Quantizer,
    TableQuantizer,
    VectorQuantizer,
)
from qat.transforms import KVCache, calibrate, uncalibrated
from qat.transforms.kv import describe_kv, quantize_kv, restore_kv, store_kv
from tests.conftest import tiny_llama
from tests.nn.kv_models import INT4, LAYOUTS, MODELS, STATIC, in_parts, kivi, quantized, tiny, tokens, whole


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_gets_quantizers(kind):
    model = quantize_kv(tiny(kind), INT4, kivi(4), 8)
    assert len(list(kv_layers(model))) == 2
    assert {kv.window for _, _, kv in kv_layers(model)} == {8}


def test_nothing_to_quantize_leaves_the_model_as_it_was():
    model = quantize_kv(tiny(attn_implementation="sdpa"), NoQuantizer, NoQuantizer)
    assert not list(kv_layers(model))
    assert model.config._attn_implementation == "sdpa"


def test_static_quantizers_are_calibrated_and_used():
    model = quantize_kv(tiny(), STATIC, STATIC)
    assert len(uncalibrated(model)) == 4
    calibrate(model, [tokens() for _ in range(2)])
    assert not uncalibrated(model)
    scales = [kv.key_quantizer.scale.clone() for _, _, kv in kv_layers(model)]
    before = whole(model, ids := tokens())
    for _, _, kv in kv_layers(model):
        kv.key_quantizer.scale.mul_(8)
    assert all((scale != 1).all() for scale in scales)
    assert not torch.equal(whole(model, ids), before)


def test_calibration_sees_the_keys_of_all_batches():
    model = quantize_kv(tiny(), STATIC, STATIC)
    (_, _, kv), *_ = kv_layers(model)
    seen = []
    handle = kv.key_quantizer.register_forward_pre_hook(lambda quantizer, args: seen.append(args[0]))
    calibrate(model, [tokens() for _ in range(3)])
    handle.remove()
    assert len(seen) == 3
    assert torch.allclose(kv.key_quantizer.scale * 127, torch.cat(seen).abs().max().float(), rtol=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_and_restored_models_compute_the_same(layout):
    model, ids = quantized(layout), tokens()
    plain = tiny()
    trained, (_, cache) = whole(model, ids), in_parts(model, ids, [40])
    store_kv(model)
    description = json.loads(json.dumps(describe_kv(model)))
    loaded = restore_kv(plain, description)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(whole(model, ids), trained)
    assert torch.equal(whole(loaded, ids), trained)
    assert not any(isinstance(module, Quantizer) for module in loaded.modules())
    logits, restored = in_parts(loaded, ids, [7, 5, 1, 27])
    assert torch.allclose(logits, trained, atol=1e-5)
    assert restored.nbytes == cache.nbytes


def test_a_checkpoint_brings_the_scales_back():
    model, ids = quantized("static"), tokens()
    other = quantize_kv(tiny(), STATIC, partial(STATIC, symmetric=False))
    other.load_state_dict(model.state_dict())
    assert torch.equal(whole(other, ids), whole(model, ids))


def test_a_copy_generates_with_its_own_quantizers():
    model, ids = quantized("static"), tokens(length=9)
    copied = copy.deepcopy(model)
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)
    for _, _, kv in kv_layers(model):
        kv.key_quantizer.scale.zero_().add_(100)
    assert torch.equal(copied.generate(ids, do_sample=False, max_new_tokens=8), expected)


def test_with_quantized_weights_too():
    scheme = qat.Scheme(weight=partial(LSQQuantizer, bits=4, granularity="per_group_32"))
    model, ids = quantize_kv(qat.prepare(tiny(), scheme), INT4, INT4), tokens()
    trained = whole(model, ids)
    store_kv(qat.convert(model))
    assert torch.allclose(whole(model, ids), trained, atol=1e-5)
    assert torch.allclose(in_parts(model, ids, [30, 10])[0], trained, atol=1e-5)


def test_full_precision_has_no_description():
    assert describe_kv(tiny()) is None
    assert restore_kv(model := tiny(), None) is model


class Unnamed(Quantizer):
    """Computes its scale from x, and names no rule for it."""

    def __init__(self, shape):
        super().__init__(shape, IntFormat(8), "per_tensor")

    def qparams(self, x):
        return QParams(x.abs().max().view(1) / 127)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(MinMaxQuantizer, granularity="per_tensor"), "per_tensor would depend on later tokens; take per_token"),
        (partial(MinMaxQuantizer, granularity="per_channel_-1"), "would depend on later tokens"),
        (partial(MinMaxQuantizer, granularity="per_flat_group_64"), "would depend on later tokens"),
        (partial(LSQQuantizer, granularity="per_token"), "per_tensor or per_channel_-1, not per_token"),
        (partial(MinMaxQuantizer, granularity="per_token", dynamic=False), "static quantizer cannot be per_token"),
        (partial(MinMaxQuantizer, granularity="per_group_12"), "keys of head_dim 16: .*12 does not divide 16"),
        (partial(TableQuantizer, granularity="per_token", double_quant=True), "set double_quant=false"),
        (Unnamed, "is for weights: no named rule"),
        (partial(INT4, bitz=3), "refused its options.*bitz"),
        (NVFP4Quantizer, "NVFP4Quantizer is for weights: .* take mxfp4"),
        (partial(VectorQuantizer, granularity="per_tensor"), "vector codebooks .* are for weights; take minmax_token"),
        (partial(INT4, rounding="stochastic"), "random rounding is for gradients, .* set rounding=nearest"),
    ],
    ids=[
        *("tensor", "channel", "flat", "lsq_token", "static_token", "odd_group", "double", "unnamed", "misspelt"),
        *("nvfp4", "vectors", "random"),
    ],
)
def test_layouts_that_cannot_be_served_are_refused(factory, message):
    model = tiny()
    with pytest.raises(InputError, match=message):
        quantize_kv(model, factory, INT4)
    assert not list(kv_layers(model))


@pytest.mark.parametrize("window", [-1, 2.5, None])
@pytest.mark.parametrize("key", [INT4, NoQuantizer], ids=["quantized", "full"])
def test_a_window_is_a_number_of_tokens(key, window):
    for refused in (lambda: KVCache(key, window=window), lambda: quantize_kv(tiny(), key, window=window)):
        with pytest.raises(InputError, match=r"it is a number of tokens: set it to 0, 32, 128"):
            refused()


def test_models_that_cannot_be_served_are_refused():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        MistralConfig,
        MistralForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=32))
    mistral = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=32, sliding_window=8))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=32, add_cross_attention=True))
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=32))
    cases = {
        "does not use the attention interface": [bloom, nn.Linear(4, 4)],
        "sliding_attention, whose cache is not quantized": [mistral],
        "cross-attention": [gpt2],
        "full causal attention": [t5],
    }
    for message, models in cases.items():
        for model in models:
            with pytest.raises(InputError, match=message):
                quantize_kv(model, INT4, INT4)


def test_other_attention_implementations_are_refused():
    model = tiny_llama()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(InputError, match=r"attention implementation flex_attention: set model.attention=sdpa"):
        quantize_kv(model, INT4, INT4)


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch):
    """transformers only logs a warning when a model cannot change it."""
    model = tiny()
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *_: None)
    with pytest.raises(InputError, match="keeps its own attention implementation"):
        quantize_kv(model, INT4, INT4)
    assert not list(kv_layers(model))


def test_the_order_of_calls_is_explained():
    model = quantize_kv(tiny(), INT4, INT4)
    with pytest.raises(InputError, match="has KV quantizers already"):
        quantize_kv(model, INT4, INT4)
    with pytest.raises(InputError, match="call store_kv"):
        describe_kv(model)
    with pytest.raises(InputError, match="never calibrated"):
        store_kv(quantize_kv(tiny(), STATIC, STATIC))
    description = describe_kv(store_kv(model))
    with pytest.raises(InputError, match="other attention layers"):
        restore_kv(tiny(num_hidden_layers=3), description)
    assert all(isinstance(kv.key_quantizer, StoredActivation) for _, _, kv in kv_layers(model))
