import copy
import pickle
from functools import partial

import pytest
import torch
from transformers import DynamicCache, StaticCache

from qat.errors import InputError
from qat.nn.kv_cache import QuantizedCache
from qat.nn.kv_quantizer import kv_layers
from qat.transforms.kv import quantize_kv, store_kv
from tests.nn.kv_models import INT4, LAYOUTS, MODELS, STATIC, in_parts, quantized, tiny, tokens, whole

CHUNKS = [7, 5, 1, 1, 20, 6]
SOME = ["int4", "kivi4_window8"]
greedy = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation_computes_what_training_simulates(layout):
    model, ids = quantized(layout), tokens()
    logits, cache = in_parts(model, ids, CHUNKS)
    assert torch.allclose(logits, whole(model, ids), atol=1e-5)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("layout", ["int8", "int4", "int2", "nf4", "kivi4_window8", "kivi32"])
def test_token_by_token_too(layout):
    model, ids = quantized(layout), tokens()
    logits, _ = in_parts(model, ids, 1)
    assert torch.allclose(logits, whole(model, ids), atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", SOME)
def test_every_model_and_implementation(layout, kind, implementation):
    model, ids = quantized(layout, kind, attn_implementation=implementation), tokens()
    logits, _ = in_parts(model, ids, CHUNKS)
    assert torch.allclose(logits, whole(model, ids), atol=1e-5)


@pytest.mark.parametrize("layout", ["int4", "nf4", "kivi4_window8", "static"])
def test_the_codes_are_those_that_training_saw(layout):
    model, ids = quantized(layout), tokens()
    (_, _, kv), *_ = kv_layers(model)
    seen = []
    kv.key_quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole(model, ids)
    _, cache = in_parts(model, ids, [40])
    stored = cache.layers[0].stored_keys
    assert torch.equal(stored.codes(), kv.key_quantizer.quantize(seen[0]).codes)
    assert torch.equal(stored.dequantize(), kv.key_quantizer(seen[0]))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", SOME)
def test_greedy_generation_is_that_of_the_model_without_a_cache(kind, layout):
    model, ids = quantized(layout, kind), tokens(length=9)
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))


@pytest.mark.parametrize("kind", MODELS)
def test_left_padding_changes_no_text(kind):
    """Scales of single tokens do not see the padding, so each text of a batch is what it is alone."""
    model, ids = quantized("int4", kind), tokens(length=9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    batch = model.generate(ids, attention_mask=mask, **greedy)
    assert torch.equal(batch[0, 9:], model.generate(ids[:1, 4:], **greedy)[0, 5:])
    assert torch.equal(batch[1, 9:], model.generate(ids[1:], **greedy)[0, 9:])


def test_left_padding_with_groups_is_what_training_sees():
    model, ids = quantized("kivi4_window8"), tokens(length=20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = whole(model, ids, attention_mask=mask, position_ids=positions)
    cache = QuantizedCache(model)
    with torch.no_grad():
        found = [
            model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 9), (9, 10), (10, 20))
        ]
    assert torch.allclose(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("layout", SOME)
def test_beam_search_reorders_the_cache(layout):
    model, ids = quantized(layout), tokens(length=9)
    beams = partial(model.generate, ids, num_beams=3, **greedy)
    assert torch.equal(beams(), beams(use_cache=False))


def test_several_samples_of_each_text():
    model, ids = quantized("kivi4_window8"), tokens(length=9)
    samples = model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=8)
    assert samples.shape == (6, 17)
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("given", [False, True], ids=["made_by_generate", "given"])
@pytest.mark.parametrize("layout", SOME)
def test_continuing_a_cache_is_one_long_generation(layout, given):
    model, ids = quantized(layout), tokens(batch=1, length=9)
    at_once = model.generate(ids, **greedy)
    own = {"past_key_values": QuantizedCache(model)} if given else {}
    first = model.generate(ids, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, **own)
    assert isinstance(first.past_key_values, QuantizedCache)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=7)
    assert torch.equal(rest, at_once)


def test_a_call_returns_a_cache_to_go_on_with():
    model, ids = quantized("kivi4_window8"), tokens()
    with torch.no_grad():
        first = model(ids[:, :30])
        second = model(ids[:, 30:], past_key_values=first.past_key_values)
    assert isinstance(second.past_key_values, QuantizedCache)
    assert torch.allclose(second.logits, whole(model, ids)[:, 30:], atol=1e-5)


def test_training_makes_no_quantized_cache():
    assert not isinstance(quantized("int4").train()(tokens()).past_key_values, QuantizedCache)


def test_gradients_pass_through_a_call_with_a_cache():
    model, ids = quantized("kivi4_window8"), tokens()
    cache = QuantizedCache(model)
    model(ids, past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert not cache.layers[0].stored_keys.tail.requires_grad


def test_memory_of_int4_is_less_than_a_third_of_bfloat16():
    model = quantize_kv(tiny(hidden_size=128, num_attention_heads=2, num_key_value_heads=1), INT4, INT4).bfloat16()
    _, cache = in_parts(model, tokens(), [40])
    layers, batch, length, head_dim = 2, 2, 40, 64
    assert cache.nbytes == layers * 2 * batch * length * (head_dim // 2 + 2)
    assert cache.nbytes < layers * 2 * batch * length * head_dim * 2 / 3


@pytest.mark.parametrize("layout", SOME)
def test_changes_of_the_batch(layout):
    model, ids = quantized(layout), tokens()
    rows = torch.tensor([1, 0, 1])
    expected = whole(model, ids[rows])[:, 30:]
    for change in ("select", "reorder", "repeat"):
        _, cache = in_parts(model, ids[:, :30], [30])
        if change == "select":
            cache.batch_select_indices(rows)
        elif change == "reorder":
            cache.reorder_cache(rows)
        else:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([2, 0, 3]))
        logits, _ = in_parts(model, ids[rows, 30:], [10], cache)
        assert torch.allclose(logits, expected, atol=1e-5), change


@pytest.mark.parametrize("tokens_to_remove", [-8, 32, torch.tensor(-8)], ids=["remove_8", "keep_32", "tensor"])
def test_cropping_then_going_on(tokens_to_remove):
    model, ids = quantized("int4"), tokens()
    _, cache = in_parts(model, ids, [40])
    cache.crop(tokens_to_remove)
    assert cache.get_seq_length() == 32
    other = torch.cat([ids[:, :32], tokens(length=5)], dim=1)
    logits, _ = in_parts(model, other[:, 32:], [5], cache)
    assert torch.allclose(logits, whole(model, other)[:, 32:], atol=1e-5)


def test_a_crop_that_is_refused_changes_nothing():
    model, ids = quantized("kivi4_window8"), tokens()
    _, cache = in_parts(model, ids[:, :33], [33])
    with pytest.raises(InputError, match="cannot be cropped to 30 tokens"):
        cache.crop(-3)
    logits, _ = in_parts(model, ids[:, 33:], [7], cache)
    assert torch.allclose(logits, whole(model, ids)[:, 33:], atol=1e-5)


def test_a_cache_is_emptied_for_the_next_text():
    model, ids = quantized("kivi4_window8"), tokens()
    _, cache = in_parts(model, tokens(batch=3), [40])
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    logits, _ = in_parts(model, ids, [40], cache)
    assert torch.allclose(logits, whole(model, ids), atol=1e-5)


def test_prompt_lookup_rolls_the_cache_back():
    model, ids = quantized("int4"), tokens(batch=1, length=20)
    ids[:, 10:] = ids[:, :10]
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **greedy), model.generate(ids, **greedy))


def test_other_caches_are_refused():
    model, ids = quantized("int4"), tokens()
    full = tiny()(ids).past_key_values
    for cache in (full, StaticCache(model.config, max_cache_len=64), DynamicCache(offloading=True)):
        with pytest.raises(InputError, match=r"Leave past_key_values and cache_implementation out, or pass an own"):
            model(ids, past_key_values=cache)
    with pytest.raises(InputError, match="StaticCache"):
        model.generate(ids, cache_implementation="static", **greedy)


@pytest.mark.parametrize("other", ["int8", "int4_window5", "keys_only", "static"])
def test_a_cache_of_another_model_is_refused(other):
    """It would store this model's tokens in its own way."""
    model, ids = quantized("int4"), tokens()
    with pytest.raises(InputError, match=r"another layout: pass QuantizedCache\(model\) of this one"):
        model(ids, past_key_values=QuantizedCache(quantized(other)))
    with pytest.raises(InputError, match=r"another layout: pass QuantizedCache\(model\) of this one"):
        model(ids, past_key_values=QuantizedCache(quantized("int4", num_hidden_layers=3)))


@pytest.mark.parametrize("layout", ["int4", "static", "learned", "keys_only"])
def test_a_cache_goes_on_where_its_copy_or_its_model_before_conversion_was(layout):
    """A prompt is read once, and its cache is copied, or saved, for every text that goes on from it."""
    model, ids = quantized(layout), tokens()
    expected = whole(model, ids)[:, 30:]
    _, cache = in_parts(model, ids[:, :30], [30])
    store_kv(model)
    for prompt in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
        logits, _ = in_parts(model, ids[:, 30:], [6, 4], prompt)
        assert torch.allclose(logits, expected, atol=1e-5)


def test_bad_input_names_the_mend():
    with pytest.raises(InputError, match="call quantize_kv"):
        QuantizedCache(tiny())
    with pytest.raises(InputError, match="never calibrated"):
        quantize_kv(tiny(), STATIC, STATIC).generate(tokens(), **greedy)
