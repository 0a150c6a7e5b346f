"""The loss at the output head is the model's, for heads of every kind; what it cannot compute is refused."""

from functools import partial

import pytest
import torch

import qat
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.head import Shape
from lightning_modules.loss import HeadLoss, head_loss
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, MinMaxQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_compilation import gradients
from tests.lightning_modules.test_module import LSQ3, TOKEN8, fit
from tests.models import LANGUAGE_MODELS, SIZES, tiny_mixtral


def tiny_granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0))


def tiny_cohere():
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625))


def tiny_gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


MODELS = LANGUAGE_MODELS | {"granite": tiny_granite, "cohere": tiny_cohere, "gemma2": tiny_gemma2}
SCHEMES = {
    "full precision": qat.Scheme(),
    "head": qat.Scheme(weight=LSQ3, input=TOKEN8, head=True),
    "codebook": qat.Scheme(weight=partial(KMeansQuantizer, bits=3), head=True),
}


def batch(rows=8):
    ids = torch.randint(0, 96, (rows, 16))
    labels = ids.clone()
    labels[0, :9] = -100
    return {"input_ids": ids, "labels": labels}


def check(model, dtype=torch.float32, tolerance=1e-4):
    """The same loss and the same gradients as the model's own."""
    found_by, data = HeadLoss(model, "chunked"), batch()
    assert found_by.pays(data)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = gradients(model, lambda: model(**data, use_cache=False).loss)
        found = gradients(model, lambda: found_by(data))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).abs().max())
        assert error <= tolerance * max(1e-6, float(value.abs().max())), name
    return found_by


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name):
    check(qat.prepare(MODELS[name](), qat.Scheme(weight=LSQ3)).eval())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_quantized_heads(name, tied):
    check(qat.prepare(tiny_llama(tie_word_embeddings=tied), SCHEMES[name]).train())


def test_under_autocast():
    check(qat.prepare(tiny_llama(), SCHEMES["head"]).train(), torch.bfloat16, tolerance=0.05)


def test_what_becomes_of_logits_is_found():
    assert HeadLoss(tiny_granite(), "chunked").head.shape == Shape(1 / 8)
    assert HeadLoss(tiny_cohere(), "chunked").head.shape == Shape(0.0625)
    assert HeadLoss(tiny_gemma2(), "chunked").head.shape == Shape(softcap=0.5)


def with_auxiliary_loss():
    model = tiny_mixtral()
    model.config.output_router_logits = True
    return model


def with_auxiliary_loss_in_16_bits():
    """Less than logits are rounded by, and yet half of what the router learns from."""
    return with_auxiliary_loss().to(torch.bfloat16)


def with_other_logits():
    model = tiny_llama()
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    model.forward = forward
    return model


ROW8 = partial(MinMaxQuantizer, bits=8, granularity="per_channel")
GRAD8 = partial(MinMaxQuantizer, bits=8, granularity="per_token", rounding="stochastic")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_auxiliary_loss, "does not compute the loss of MixtralForCausalLM"),
        (with_auxiliary_loss_in_16_bits, "does not compute the loss of MixtralForCausalLM"),
        (with_other_logits, "changes its logits or adds to its loss"),
        (lambda: qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3, output=TOKEN8, head=True)), "scheme quantizes"),
        (lambda: qat.prepare(tiny_llama(), qat.Scheme(grad=GRAD8, head=True)), "or their gradient"),
        (lambda: qat.prepare(tiny_llama(), qat.Scheme(weight=ROW8, input=TOKEN8, compute="int8", head=True)), "codes"),
        (lambda: torch.nn.Linear(2, 2), "needs an output head"),
    ],
    ids=[
        "auxiliary loss",
        "in 16 bits",
        "other logits",
        "output quantizer",
        "gradient quantizer",
        "product of codes",
        "no head",
    ],
)
def test_what_it_cannot_compute(make, message):
    with pytest.raises(InputError, match=message):
        head_loss(make(), "chunked")
    assert head_loss(make(), "auto") is None


def test_other_losses_say_what_they_need(monkeypatch):
    with pytest.raises(InputError, match=r"module.loss is 'ligr'. Did you mean 'liger'"):
        head_loss(tiny_llama(), "ligr")
    assert head_loss(tiny_llama(), "model") is None
    for kind, package in (("liger", "liger_kernel"), ("cce", "cut_cross_entropy")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=rf"pip install lightning-qat\[{kind}\]"):
            head_loss(tiny_llama(), kind)
        monkeypatch.setattr("importlib.util.find_spec", lambda name, own=package: name == own or None)
        with pytest.raises(InputError, match=f"module.loss={kind} runs on a GPU only"):
            head_loss(tiny_llama(), kind)


def test_a_few_tokens_are_left_to_the_model():
    loss = head_loss(tiny_llama(), "auto")
    assert loss.pays(batch())
    assert not loss.pays(batch(rows=1))


def test_a_batch_with_nothing_to_learn_teaches_nothing():
    model, data = tiny_llama(), batch()
    data["labels"].fill_(-100)
    found = gradients(model, lambda: HeadLoss(model, "chunked")(data))
    assert all((value == 0).all() for value in found.values())


def trained(folder, loss, **options):
    torch.manual_seed(0)
    model = qat.prepare(tiny_llama(hidden_size=8, head_dim=4), qat.Scheme(weight=partial(MinMaxQuantizer, bits=4)))
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), loss=loss, **options)
    rows = fit(folder, module)
    assert module.head_loss is None
    return [row["train/loss"] for row in rows.values() if "train/loss" in row], module.state_dict()


@pytest.mark.parametrize(
    "options", [{}, {"compile": "aot_eager", "gradient_checkpointing": True}], ids=["", "compiled"]
)
def test_training_goes_the_same_way(tmp_path, monkeypatch, options):
    used = []
    call = HeadLoss.__call__
    monkeypatch.setattr(HeadLoss, "__call__", lambda self, data: (used.append(1), call(self, data))[1])
    _, expected = trained(tmp_path / "model", "model", **options)
    assert not used
    _, found = trained(tmp_path / "auto", "auto", **options)
    assert len(used) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
