import pytest
import torch

from qat.errors import InputError
from qat.nn import attention
from qat.nn.kv_quantizer import kv_layers
from qat.quantizers import NoQuantizer
from qat.transforms import calibrate
from qat.transforms.kv import quantize_kv
from tests.nn.kv_models import INT2, INT4, LAYOUTS, LEARNED, MODELS, kivi, quantized, tiny, tokens, whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_past_output_sees_a_future_token(layout):
    model, ids = quantized(layout), tokens()
    changed = ids.clone()
    changed[:, 21:] = tokens(length=19)
    before, after = whole(model, ids), whole(model, changed)
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21:], after[:, 21:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["kivi4", "kivi32_window8"])
def test_padding_tells_nothing_about_later_tokens(layout, implementation):
    """A group of six padded slots and text: padding that saw the end of the text would move the group's scale."""
    model, ids = quantized(layout, attn_implementation=implementation), tokens()
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    changed = ids.clone()
    changed[:, 36:] = tokens(length=4)
    before, after = (whole(model, text, attention_mask=mask) for text in (ids, changed))
    assert torch.equal(before[:, 6:36], after[:, 6:36])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["int4", "kivi4_window8"])
def test_quantization_is_felt(kind, layout):
    torch.manual_seed(1)
    plain, ids = tiny(kind), tokens()
    torch.manual_seed(1)
    assert (whole(quantized(layout, kind), ids) - whole(plain, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["int4", "kivi4", "kivi4_window8", "blocks_of_both"])
def test_eager_and_sdpa_agree(kind, layout):
    ids, logits = tokens(), []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(1)
        logits.append(whole(quantized(layout, kind, attn_implementation=implementation), ids))
    assert torch.allclose(*logits, atol=1e-5)


def test_selection_equals_one_query_at_a_time():
    """The definition: each query attends to the text up to itself, in the form that it has at that length."""
    model, ids = quantized("kivi4_window8"), tokens()
    single = torch.cat([whole(model, ids[:, :end])[:, -1:] for end in range(1, 41)], dim=1)
    assert torch.allclose(whole(model, ids), single, atol=1e-5)


@pytest.mark.parametrize("layout", ["kivi4", "kivi4_window8", "int4_window5"])
def test_a_window_that_never_ends_changes_nothing(layout):
    key, value, _ = LAYOUTS[layout]
    torch.manual_seed(1)
    plain, ids = tiny(), tokens()
    torch.manual_seed(1)
    assert torch.allclose(whole(quantize_kv(tiny(), key, value, 64), ids), whole(plain, ids), atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", ["int4", "kivi4_window8"])
def test_masks_of_every_kind_are_kept(implementation, layout):
    """Right padding, as no mask, a boolean one, an additive one and that of transformers, moves no earlier output."""
    model, ids = quantized(layout, attn_implementation=implementation), tokens()
    allowed = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40)
    additive = torch.zeros(2, 1, 40, 40, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    masks = [torch.ones_like(ids), additive] + [allowed] * (implementation == "sdpa")
    expected = whole(model, ids)
    for mask in masks:
        assert torch.allclose(whole(model, ids, attention_mask=mask), expected, atol=1e-5)
    padded = torch.ones_like(ids)
    padded[:, 30:] = 0
    assert torch.allclose(whole(model, ids, attention_mask=padded)[:, :30], expected[:, :30], atol=1e-5)


@pytest.mark.parametrize("layout", ["int4", "kivi4_window8"])
def test_gradients_reach_the_projections(layout):
    model, ids = quantized(layout).train(), tokens()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            assert parameter.grad.abs().sum() > 0, name


def test_gradients_reach_learned_quantizers():
    model, ids = calibrate(quantize_kv(tiny(), LEARNED, LEARNED, 4), [tokens()]).train(), tokens()
    model(ids, labels=ids).loss.backward()
    found = [p.grad for _, _, kv in kv_layers(model) for p in kv.parameters()]
    assert len(found) == 4
    assert all(grad.abs().sum() > 0 for grad in found)


@pytest.mark.parametrize("layout", ["int4", "kivi4_window8"])
def test_gradient_checkpointing_changes_nothing(layout):
    ids, gradients = tokens(), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = quantized(layout).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_helps():
    """Quantized keys and values are something that training adapts to."""
    model, ids = quantized("int2").train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_of_attention_acts_in_training_only():
    model, ids = quantized("kivi4_window8", attention_dropout=0.5), tokens()
    assert torch.equal(whole(model, ids), whole(model, ids))
    model.train()
    assert not torch.equal(whole(model, ids), whole(model, ids))


def test_a_layer_without_quantizers_is_left_alone():
    model, ids = quantized("int2"), tokens()
    for _, module, _ in list(kv_layers(model)):
        del module.kv_quantizer
    torch.manual_seed(1)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(whole(model, ids), whole(plain, ids))


def test_a_score_function_that_is_not_known_is_refused():
    model = quantize_kv(tiny(), kivi(4), INT2)
    _, module, _ = next(kv_layers(model))
    x = torch.randn(1, 4, 8, 16)
    with pytest.raises(InputError, match=r"softcap.*with window 0"):
        attention.quantized_attention(lambda *_, **__: (x, None), module, x, x, x, None, softcap=30.0)
    model = quantize_kv(tiny(), INT4, NoQuantizer)
    _, module, _ = next(kv_layers(model))
    output, _ = attention.quantized_attention(lambda *_, **__: (x, None), module, x, x, x, None, softcap=30.0)
    assert output is x
