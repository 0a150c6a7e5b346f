"""bitsandbytes checkpoints: read by transformers with the library on a CPU, and what these write read by us."""

import json
import math
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
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer
from tests.export.exported import MODELS, converted, logits, quantization, same_codes, same_files, token_ids

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes reads what is tested here")

WEIGHTS = {
    "nf4": partial(TableQuantizer, granularity="per_group_32"),
    "nf4, double": partial(TableQuantizer, granularity="per_group_32", double_quant=True),
    "flat": partial(TableQuantizer, granularity="per_flat_group_32"),
    "flat, double": partial(TableQuantizer, granularity="per_flat_group_32", double_quant=True),
}
TOKEN = partial(MinMaxQuantizer, granularity="per_token")
LAYER = "model.layers.0.mlp.down_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture
def target():
    return Checkpoint(BitsAndBytes())


def loaded(folder, **options):
    """The model as users load it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()
    for layer in four_bit_layers(model).values():
        # For CPUs with bfloat16 products the library rounds the scales to bfloat16: other values than the file's.
        layer.support_avx512bf16_for_cpu = False
    return model


def four_bit_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def dequantized(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_bits(name, weight, dtype, target, tmp_path):
    """Every weight and all logits, and what is read back by us has them too."""
    model = converted(name, WEIGHTS[weight], dtype)
    theirs = loaded(target.write(model, tmp_path / "one"))
    layers = four_bit_layers(theirs)
    assert layers.keys() == layer_grids(model).keys()
    for place, layer in layers.items():
        assert torch.equal(dequantized(layer), model.get_submodule(place).weight.dequantize())
    assert torch.equal(logits(theirs, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name, weight, target, tmp_path):
    """The same codes and scales, the same logits, and written again the same bytes."""
    model = converted(name, WEIGHTS[weight], torch.bfloat16)
    read = target.read(target.write(model, tmp_path / "one"))
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert weight.startswith("flat") or same_codes(model, read)  # flat groups come back as groups of rows
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_the_file_is_what_the_library_writes(double, target, tmp_path):
    """The weights that we quantize, quantized by the library: the same tensors, to the bit.

    With double quantization only dtypes, sizes and tables: our codes are found by the scales that are stored, the
    library's by those before they were quantized.
    """
    weight = partial(TableQuantizer, double_quant=double)
    torch.manual_seed(0)
    plain = MODELS["llama, tied"]().get_submodule(LAYER).weight.detach()
    folder = target.write(converted("llama, tied", weight), tmp_path / "ours")
    ours = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if LAYER in name}
    data, state = bnb.functional.quantize_4bit(plain, blocksize=64, quant_type="nf4", compress_statistics=double)
    theirs = {f"{LAYER}.weight": data}
    theirs |= {f"{LAYER}.weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape[1:]) == (tensor.dtype, tensor.shape[1:])
        if not double or name.endswith("map"):
            assert torch.equal(ours[name], tensor)
    told = [json.loads(bytes(tensors[STATE].tolist())) for tensors in (ours, theirs)]
    assert told[0] | {"nested_offset": None} == told[1] | {"nested_offset": None}
    assert told[0].get("nested_offset", 0) == pytest.approx(told[1].get("nested_offset", 0), rel=1e-6)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_the_bytes_are_those_of_the_format(double, target, tmp_path):
    """Decoded one code at a time, as the format is described."""
    model = converted("llama, tied", partial(TableQuantizer, double_quant=double), torch.float32)
    files = load_file(target.write(model, tmp_path / "bnb") / "model.safetensors")
    values = model.get_submodule(LAYER).weight.dequantize()
    rows, columns = values.shape
    weight, absmax, table = (files[f"{LAYER}.weight{leaf}"] for leaf in ("", ".absmax", ".quant_map"))
    state = json.loads(bytes(files[STATE].tolist()))
    assert (weight.dtype, weight.shape) == (torch.uint8, (rows * columns // 2, 1))
    assert (state["blocksize"], state["shape"], state["dtype"]) == (64, [rows, columns], "float32")

    def scale(block):
        if not double:
            return absmax[block]
        nested, nested_map = (files[f"{LAYER}.weight.{leaf}"] for leaf in ("nested_absmax", "nested_quant_map"))
        return nested_map[int(absmax[block])] * nested[block // 256] + torch.tensor(state["nested_offset"])

    for place in range(0, rows * columns, 13):
        byte = int(weight[place // 2])
        code = byte & 15 if place % 2 else byte >> 4
        assert table[code] * scale(place // 64) == values.flatten()[place]


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_library_quantizes_is_read(name, double, target, tmp_path):
    """Loaded by transformers in 4 bits, and saved: also where blocks cross rows, which no layer here has on its own."""
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    MODELS[name]().bfloat16().save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = loaded(tmp_path / "plain", quantization_config=options, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "saved")
    read = target.read(tmp_path / "saved")
    for place, layer in four_bit_layers(theirs).items():
        assert torch.equal(read.get_submodule(place).weight.dequantize(), values_by_format(layer))
    assert type(read.get_submodule("lm_head")) is nn.Linear


def values_by_format(layer):
    """Dequantized by plain arithmetic: the library's CPU kernel takes wrong scales where blocks cross rows."""
    state = layer.weight.quant_state
    scale = state.absmax
    if state.nested:
        nested = state.state2
        scale = nested.code[scale.long()] * nested.absmax.repeat_interleave(256)[: len(scale)] + state.offset
    codes = torch.cat([layer.weight.data >> 4, layer.weight.data & 15], dim=1).flatten()
    values = state.code[codes.long()] * scale.repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape).to(state.dtype)


def test_layers_of_other_blocks_and_without_any(target, tmp_path):
    """Each layer says its own block size, and whether its scales are quantized."""
    rules = {"down": qat.Rule("*.down_proj", weight=partial(TableQuantizer, double_quant=True))}
    model = converted("llama, tied", WEIGHTS["nf4"], rules=rules, exclude=["*.0.mlp.up_proj"])
    folder = target.write(model, tmp_path / "bnb")
    said = quantization(folder)
    assert said["llm_int8_skip_modules"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert said["bnb_4bit_use_double_quant"] is True
    theirs = loaded(folder)
    assert four_bit_layers(theirs).keys() == layer_grids(model).keys()
    assert torch.equal(logits(theirs, token_ids()), logits(model, token_ids()))
    assert same_codes(model, target.read(folder))


def test_a_head_of_its_own_may_be_quantized(target, tmp_path):
    model = converted("qwen, with biases", WEIGHTS["nf4"], head=True)
    folder = target.write(model, tmp_path / "bnb")
    assert same_codes(model, target.read(folder))
    assert torch.equal(logits(loaded(folder), token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (partial(LSQQuantizer, bits=4), {}, "int4 codes.*quantizer@scheme.weight=nf4"),
        (partial(MinMaxQuantizer, bits=4, format="fp4_e2m1"), {}, "fp4_e2m1 codes.*quantizer@scheme.weight=nf4"),
        (partial(KMeansQuantizer, init="nf4"), {}, "a table that is not NF4.*quantizer@scheme.weight=nf4"),
        (partial(TableQuantizer, granularity="per_group_16"), {}, "per_group_16.*granularity=per_group_32"),
        (partial(TableQuantizer, granularity="per_tensor"), {}, "per_tensor.*granularity=per_group_64"),
        (partial(TableQuantizer, granularity="per_flat_group_4096"), {}, "rows of 64.*granularity=per_group_64"),
        (partial(TableQuantizer, scale_dtype="bfloat16"), {}, "not float32.*scale_dtype=float32"),
        (WEIGHTS["nf4"], {"input": TOKEN}, "input=none"),
        (WEIGHTS["nf4"], {"embedding": True}, "embedding layer.*scheme.embedding=false"),
        (WEIGHTS["nf4"], {"kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
    ],
    ids=["integers", "fp4", "learned", "groups", "tensor", "flat", "scales", "input", "embedding", "kv"],
)
def test_what_it_cannot_hold_is_refused_before_training(weight, options, message, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    with torch.device("meta"):
        model = MODELS["llama, tied"]()
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


def test_another_table_of_the_same_size_is_refused_by_its_values(target, tmp_path):
    model = converted("llama, tied", partial(TableQuantizer, family="af"))
    with pytest.raises(InputError, match=r"a table that is not NF4.*quantizer@scheme.weight=nf4"):
        target.write(model, tmp_path / "bnb")


def test_rows_that_no_block_divides_are_refused(target):
    model = nn.Sequential(nn.Linear(48, 64))
    qat.prepare(model, qat.Scheme(weight=partial(TableQuantizer, granularity="per_flat_group_64")), initialize=False)
    with pytest.raises(InputError, match=r"per_flat_group_64 on rows of 48.*scheme.exclude"):
        target.check(model)


def test_fp4_of_the_library_is_not_ours():
    """Which is why it is refused."""
    theirs = bnb.functional.get_4bit_type("fp4", device="cpu")
    ours = qat.numerics.formats.parse_format("fp4_e2m1").decode(torch.arange(16)[None])[0] / 6
    assert sorted(theirs.abs().unique().tolist()) != sorted(ours.abs().unique().tolist())
    assert math.isclose(theirs[1], 1 / 192, rel_tol=1e-6)
    assert math.isclose(ours[1], 1 / 12, rel_tol=1e-6)


def changed_state(**said):
    def change(packed):
        state = json.loads(bytes(packed.tolist())) | said
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("absmax", lambda _: None, "down_proj has no tensor weight.absmax"),
        ("absmax", lambda t: t[:-1].clone(), r"absmax is \[127\].*\[128\]"),
        ("absmax", lambda t: t.to(torch.uint8), "absmax is torch.uint8, not torch.float32"),
        ("quant_map", lambda t: t.flip(0), "quant_map is not the table"),
        ("quant_state.bitsandbytes__nf4", lambda _: None, "has no tensor weight.quant_state"),
        ("quant_state.bitsandbytes__nf4", lambda t: t[:-9].clone(), "nf4 is damaged"),
        ("quant_state.bitsandbytes__nf4", changed_state(shape=[64, 64]), "4096 bytes.*64, 64"),
        ("quant_state.bitsandbytes__nf4", changed_state(shape=[128, 64]), "its config.json says"),
        ("quant_state.bitsandbytes__nf4", changed_state(shape=None), "nf4 is damaged"),
        ("quant_state.bitsandbytes__nf4", changed_state(blocksize=48), "is not that of a matrix in NF4"),
        ("quant_state.bitsandbytes__nf4", changed_state(nested_blocksize=256), "nf4 is damaged"),
    ],
    ids=["no scales", "scales", "dtype", "table", "no state", "cut", "size", "shape", "no shape", "block", "nested"],
)
def test_damaged_tensors_are_refused(leaf, change, message, target, tmp_path):
    folder = target.write(converted("llama, tied", partial(TableQuantizer)), tmp_path / "bnb")
    tensors = load_file(folder / "model.safetensors")
    name = f"{LAYER}.weight.{leaf}"
    tensors[name] = change(tensors[name])
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        target.read(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "is no bitsandbytes checkpoint"),
        ({"bnb_4bit_quant_type": "fp4"}, "quant_type=fp4; only nf4"),
        ({"quant_method": "gptq"}, "is no bitsandbytes checkpoint.*gptq"),
    ],
    ids=["8 bits", "fp4", "method"],
)
def test_a_config_that_says_something_else_is_refused(said, message, target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHTS["nf4"]), tmp_path / "bnb")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        target.read(folder)
