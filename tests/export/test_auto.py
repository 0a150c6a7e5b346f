"""The native artifact by `AutoModelForCausalLM.from_pretrained`."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import qat
import qat.export.auto
from qat.nn import PackedLinear
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer
from qat.transforms import KVCache
from tests.export.exported import MODELS, converted, logits, token_ids

INT3 = partial(LSQQuantizer, bits=3, granularity="per_group_32")
TOKEN = partial(MinMaxQuantizer, bits=8, granularity="per_token")
SCHEMES = {
    "weights": {"weight": INT3},
    "everything": {"weight": INT3, "input": TOKEN, "embedding": True, "head": True},
    "codebooks": {"weight": partial(KMeansQuantizer, bits=3)},
    "nested scales": {"weight": partial(TableQuantizer, bits=4, granularity="per_group_32", double_quant=True)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_same_bits(name, scheme, dtype, tmp_path):
    """Every number keeps the dtype that it is stored in, scales of another than the model's included."""
    model = converted(name, dtype=dtype, **SCHEMES[scheme])
    qat.save(model, tmp_path / "a")
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert any(isinstance(module, PackedLinear) for module in read.modules())


def test_a_quantized_cache_is_there_too(tmp_path):
    model = converted("llama, tied", INT3, kv=KVCache(TOKEN, TOKEN))
    qat.save(model, tmp_path / "a")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(read.generate(token_ids(1), **options), model.generate(token_ids(1), **options))


def test_without_the_class_transformers_says_what_is_missing(tmp_path):
    """It fills the model with random numbers all the same."""
    qat.save(converted("llama, tied", INT3), tmp_path / "a")
    code = (
        f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path / 'a')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Unknown quantization type, got lightning-qat" in done.stderr


def test_a_full_model_is_not_quantized_on_loading(tmp_path):
    MODELS["llama, tied"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qat.export.auto.ArtifactConfig())
