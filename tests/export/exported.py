"""Models that are exported in tests: trained grids with learned scales, biases, tied heads and transposed layers."""

import json

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import qat
from tests.conftest import tiny_llama
from tests.models import SIZES, tiny_gpt2

MODELS = {
    "llama, tied": lambda: tiny_llama(),
    "qwen, with biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gpt2, transposed": tiny_gpt2,
}


def converted(name, weight, dtype=torch.float32, **scheme):
    """The model `name` with Parameters in `dtype`, as transformers loads it, quantized and converted."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return qat.convert(qat.prepare(model, qat.Scheme(weight=weight, **scheme)))


def token_ids(rows=2, length=16):
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def same_codes(one, other):
    """Whether two converted models store the same numbers for every quantized weight."""
    ours, theirs = one.state_dict(), other.state_dict()
    stored = [name for name in ours if ".weight." in name]
    return stored and all(torch.equal(ours[name], theirs[name]) for name in stored)


def same_files(one, other):
    """Whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def quantization(folder):
    """The `quantization_config` of a checkpoint."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]
