"""Opening whatever is quantized already, and training on from its grid."""

import json
from functools import partial

import pytest
import torch

import qat
from lightning_modules.models import load_hf
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.layouts.gptq import Gptq
from qat.export.native import Native
from qat.nn import PackedLayer
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms.unpack import adopt_grids, unpack
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.export.exported import converted, logits, token_ids

INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
TARGETS = {"native": Native(), "gptq": Checkpoint(Gptq())}


@pytest.fixture(params=TARGETS)
def folder(request, tmp_path):
    return TARGETS[request.param].write(converted("llama, tied", INT4), tmp_path / "model", tiny_tokenizer())


def test_load_finds_out_what_it_is(folder):
    assert torch.equal(logits(qat.load(folder), token_ids()), logits(converted("llama, tied", INT4), token_ids()))


def test_a_model_in_full_precision_is_no_quantized_one(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not an artifact of this project"):
        qat.load(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [({"quant_method": "gptqq"}, "Did you mean 'gptq'"), ({}, "is damaged"), ([], "is damaged")],
)
def test_what_is_not_known(quantization, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(InputError, match=message):
        qat.load(tmp_path)


def test_options_of_artifacts(tmp_path):
    folder = TARGETS["gptq"].write(converted("llama, tied", INT4), tmp_path / "model")
    with pytest.raises(InputError, match="bits are for artifacts"):
        qat.load(folder, bits=2)


def test_a_quantized_model_is_a_start_for_training(folder):
    """Its weights are what the codes stand for, and the same scheme begins with its very grid."""
    loaded = load_hf(str(folder))
    packed = qat.load(folder)
    assert not any(isinstance(module, PackedLayer) for module in loaded.model.modules())
    assert torch.equal(logits(loaded.model, token_ids()), logits(packed, token_ids()))
    model = qat.prepare(loaded.model, qat.Scheme(weight=INT4))
    assert not all(_same_scales(model, packed))  # least squares of what is on a grid finds other scales at times
    assert adopt_grids(model, loaded.grids) == list(loaded.grids)
    assert all(_same_scales(model, packed))
    assert torch.equal(logits(qat.convert(model), token_ids()), logits(packed, token_ids()))


def _same_scales(model, packed):
    for name, layer in model.named_modules():
        if isinstance(layer, qat.nn.QuantLayer):
            stored = packed.get_submodule(name).weight
            yield torch.equal(layer.weight_quantizer.quantize(layer.weight).qparams.scale, stored.scale)


@pytest.mark.parametrize(
    ("weight", "starts"),
    [
        (partial(LSQQuantizer, bits=3, granularity="per_group_32"), 0),
        (partial(LSQQuantizer, bits=4, granularity="per_group_64"), 0),
        (partial(KMeansQuantizer, bits=4), 0),
        (partial(LSQQuantizer, bits=4, granularity="per_flat_group_32"), 14),
        (partial(MinMaxQuantizer, bits=4, granularity="per_group_32", dynamic=False), 14),
    ],
    ids=["bits", "groups", "format", "the same groups", "another quantizer"],
)
def test_another_grid_starts_by_itself(weight, starts):
    packed = converted("llama, tied", INT4)
    grids = unpack(packed, torch.float32)
    model = qat.prepare(packed, qat.Scheme(weight=weight))
    assert len(adopt_grids(model, grids)) == starts


def test_shared_weights_stay_shared():
    scheme = {"embedding": True, "head": True}
    packed = converted("llama, tied", INT4, **scheme)
    expected = logits(packed, token_ids())
    unpack(packed, torch.float32)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert torch.equal(logits(packed, token_ids()), expected)


def test_codebooks_are_a_start_too():
    weight = partial(KMeansQuantizer, bits=3)
    packed = converted("llama, tied", weight)
    expected = logits(packed, token_ids())
    grids = unpack(packed, torch.float32)
    model = qat.prepare(packed, qat.Scheme(weight=weight))
    assert len(adopt_grids(model, grids)) == len(grids) == 14
    assert torch.equal(logits(qat.convert(model), token_ids()), expected)
