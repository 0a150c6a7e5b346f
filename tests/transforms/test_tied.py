"""Weights that several layers share are quantized once, and stored once."""

import json
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.export.artifact import bits_per_weight
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, Quantizer
from qat.transforms import quant_layers
from tests.conftest import tiny_llama
from tests.models import tiny_gemma, tiny_gpt2

LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
WANTED = {
    "head": {"head": True},
    "embedding": {"embedding": True},
    "both": {"head": True, "embedding": True},
}


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_gemma], ids=["llama", "gpt2", "gemma3"])
def test_a_tied_pair_stays_tied(build, wanted, tmp_path):
    model, ids = qat.prepare(build(), qat.Scheme(weight=LSQ4, **wanted)).eval(), torch.randint(0, 96, (2, 9))
    embedding, head = ends(model)
    assert embedding.weight is head.weight
    assert isinstance(embedding.weight_quantizer, Quantizer)
    assert embedding.weight_quantizer is head.weight_quantizer
    with torch.no_grad():
        trained = model(ids).logits
    bits = bits_per_weight(model)
    embedding, head = ends(qat.convert(model))
    assert embedding.weight is head.weight
    artifact = qat.save(model, tmp_path / "artifact")
    loaded = qat.load(artifact)
    embedding, head = ends(loaded)
    assert embedding.weight.codes.data_ptr() == head.weight.codes.data_ptr()
    assert any("codes" in name for name in json.loads((artifact / "quant_config.json").read_text())["tied"])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)
    assert bits == bits_per_weight(loaded) == 4.5


def test_a_tied_weight_learns_from_both_ends():
    ids = torch.randint(0, 96, (2, 9))
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, head=True))
    model(ids, labels=ids).loss.backward()
    embedding, _ = ends(model)
    untied = torch.zeros_like(embedding.weight, dtype=torch.bool)
    untied[ids.unique()] = True
    assert embedding.weight.grad[untied].abs().sum() > 0  # looked up
    assert embedding.weight.grad[~untied].abs().sum() > 0  # only a logit
    assert embedding.weight_quantizer.log_scale.grad.abs().sum() > 0


@pytest.mark.parametrize(("wanted", "quantized"), [("head", "lm_head"), ("embedding", "model.embed_tokens")])
def test_untied_ends_are_independent(wanted, quantized):
    model = qat.prepare(tiny_llama(tie_word_embeddings=False), qat.Scheme(weight=LSQ4, **WANTED[wanted]))
    names = {name for name, _ in quant_layers(model)}
    assert names & {"lm_head", "model.embed_tokens"} == {quantized}


def test_a_tied_pair_is_left_alone_unless_asked_for():
    names = {name for name, _ in quant_layers(qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4)))}
    assert not names & {"lm_head", "model.embed_tokens"}


def test_a_rule_for_one_end_holds_for_both():
    rules = {"head": {"match": "lm_head", "weight": partial(MinMaxQuantizer, bits=8, granularity="per_channel")}}
    embedding, head = ends(qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, rules=rules, head=True)))
    assert embedding.weight_quantizer is head.weight_quantizer
    assert embedding.weight_quantizer.format.name == "int8"


@pytest.mark.parametrize("excluded", ["lm_head", "*.embed_tokens"])
def test_quantizing_one_end_alone_is_refused(excluded):
    with pytest.raises(InputError, match=r"share one weight, .* exclude both, or neither"):
        qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4, head=True, exclude=excluded))
