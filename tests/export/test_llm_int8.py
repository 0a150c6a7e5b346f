"""bitsandbytes checkpoints in 8 bits: read by transformers with the library on a CPU, and back by us."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.grids import layer_grids
from qat.export.layouts.bitsandbytes import BitsAndBytes
from qat.export.layouts.llm_int8 import LlmInt8
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, TableQuantizer
from tests.export.exported import MODELS, converted, logits, quantization, same_codes, same_files, token_ids

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes reads what is tested here")

WEIGHT = partial(MinMaxQuantizer, bits=8, granularity="per_channel")
TOKEN = partial(MinMaxQuantizer, bits=8, granularity="per_token", scale_dtype="float32")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def target():
    return Checkpoint(LlmInt8())


def loaded(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


def eight_bit_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_has_the_same_weights(name, dtype, target, tmp_path):
    """Every weight to the bit; logits but for inputs, which the library rounds to float16 before their codes."""
    model = converted(name, WEIGHT, dtype, input=TOKEN)
    theirs = loaded(target.write(model, tmp_path / "int8"))
    found, expected = logits(theirs, token_ids()).float(), logits(model, token_ids()).float()
    layers = eight_bit_layers(theirs)
    assert layers.keys() == layer_grids(model).keys()
    for place, layer in layers.items():
        values = bnb.functional.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
        assert torch.equal(values.to(dtype), model.get_submodule(place).weight.dequantize())
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_have_the_same_codes(dtype):
    """But where a number lies within float32's rounding of the middle between two codes."""
    x = torch.randn(256, 512).to(dtype)
    model = converted("llama, tied", WEIGHT, dtype, input=TOKEN)
    q = model.get_submodule(LAYER).input_quantizer.quantize(x)
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(x.half())
    assert (codes != q.codes).float().mean() < 1e-3
    assert torch.allclose(q.qparams.scale.flatten(), absmax / 127, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name, target, tmp_path):
    """The same codes and scales, the same logits, and written again the same bytes."""
    model = converted(name, WEIGHT, torch.bfloat16, input=TOKEN)
    read = target.read(target.write(model, tmp_path / "one"))
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


def test_the_tensors_are_those_of_the_format(target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHT, input=TOKEN), tmp_path / "int8")
    files = load_file(folder / "model.safetensors")
    q = converted("llama, tied", WEIGHT, input=TOKEN).get_submodule(LAYER).weight.quantized()
    assert torch.equal(files[f"{LAYER}.weight"], q.codes)
    assert torch.equal(files[f"{LAYER}.SCB"] / 127, q.qparams.scale.flatten().float())
    assert (files[f"{LAYER}.weight_format"].dtype, files[f"{LAYER}.weight_format"].tolist()) == (torch.uint8, 0)
    assert quantization(folder) == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": 0.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
    }


def test_every_product_of_a_code_and_a_bfloat16_scale_is_exact():
    """All mantissas of a scale, all codes: why these scales and no others are taken."""
    scale = (torch.arange(128, 256) / 128 * 2**-9).view(-1, 1)
    codes = torch.arange(-128, 128).to(torch.int8).expand(128, -1).contiguous()
    assert torch.equal(bnb.functional.int8_vectorwise_dequant(codes, scale.flatten() * 127), codes * scale)
    finer = (torch.arange(1024, 2048) / 1024 * 2**-9).view(-1, 1)
    codes = torch.arange(-128, 128).to(torch.int8).expand(1024, -1).contiguous()
    assert not torch.equal(bnb.functional.int8_vectorwise_dequant(codes, finer.flatten() * 127), codes * finer)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (WEIGHT, {}, "inputs in full precision.*quantizer@scheme.input=minmax_token"),
        (WEIGHT, {"input": partial(TOKEN, bits=4)}, "another grid.*quantizer@scheme.input=minmax_token"),
        (partial(WEIGHT, bits=4), {"input": TOKEN}, "int4 codes.*scheme.weight.bits=8"),
        (partial(WEIGHT, symmetric=False), {"input": TOKEN}, "with zero points.*quantizer@scheme.weight=minmax"),
        (partial(WEIGHT, scale_dtype="float16"), {"input": TOKEN}, "not bfloat16.*scale_dtype=bfloat16"),
        (partial(LSQQuantizer, bits=8, granularity="per_group_64"), {"input": TOKEN}, "per_group_64.*=per_channel"),
        (WEIGHT, {"input": TOKEN, "embedding": True}, "embedding layer.*scheme.embedding=false"),
        (WEIGHT, {"input": TOKEN, "kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
    ],
    ids=["no input", "input", "bits", "zero points", "scales", "groups", "embedding", "kv"],
)
def test_what_it_cannot_hold_is_refused_before_training(weight, options, message, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    with torch.device("meta"):
        model = MODELS["llama, tied"]()
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("SCB", lambda _: None, "down_proj.weight is torch.int8, which are codes"),
        ("SCB", lambda t: t[:-1].clone(), r"SCB is \[63\].*\[64\]"),
        ("SCB", lambda t: t + 1e-4, "more bits than bfloat16"),
        ("weight", torch.Tensor.half, "weight is torch.float16, not torch.int8"),
        ("weight_format", lambda t: t + 2, "in the order of a GPU"),
    ],
    ids=["no scales", "scales", "fine scales", "dtype", "order"],
)
def test_damaged_tensors_are_refused(leaf, change, message, target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHT, input=TOKEN), tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.{leaf}"] = change(tensors[f"{LAYER}.{leaf}"])
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        target.read(folder)


def test_what_the_library_quantizes_is_refused(target, tmp_path):
    """Its scales are those of float16 weights, and it leaves outliers in 16 bits: neither is a grid here."""
    from transformers import BitsAndBytesConfig

    MODELS["llama, tied"]().save_pretrained(tmp_path / "plain")
    for threshold, message in ((6.0, "llm_int8_threshold=6.0; only 0.0"), (0.0, "more bits than bfloat16")):
        options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        loaded(tmp_path / "plain", quantization_config=options).save_pretrained(tmp_path / "saved")
        with pytest.raises(InputError, match=message):
            target.read(tmp_path / "saved")


def test_the_two_layouts_of_bitsandbytes_know_each_other(target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHT, input=TOKEN), tmp_path / "int8")
    with pytest.raises(InputError, match="is no bitsandbytes checkpoint"):
        Checkpoint(BitsAndBytes()).read(folder)
    four = Checkpoint(BitsAndBytes()).write(converted("llama, tied", partial(TableQuantizer)), tmp_path / "nf4")
    with pytest.raises(InputError, match=r"is no LLM\.int8 checkpoint"):
        target.read(four)


def test_a_name_at_the_end_of_another_is_refused(target):
    """transformers would leave both in full precision."""
    model = nn.ModuleDict({"gate": nn.Linear(32, 32), "block": nn.ModuleDict({"gate": nn.Linear(32, 32)})})
    qat.prepare(model, qat.Scheme(weight=WEIGHT, input=TOKEN, exclude=["gate"]), initialize=False)
    with pytest.raises(InputError, match=r"gate in full precision, which would be taken for block.gate too"):
        target.check(model)


def test_a_config_that_says_something_else_is_refused(target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHT, input=TOKEN), tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is no LLM\.int8 checkpoint.*awq"):
        target.read(folder)
