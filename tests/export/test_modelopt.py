"""ModelOpt checkpoints: names, dtypes, shapes and numbers against the published layout, and back.

TensorRT-LLM and vLLM, which read them, need GPUs; what is tested here is what their loaders take.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.layouts.modelopt import ModelOpt
from qat.quantizers import LSQQuantizer, MicroscalingQuantizer, MinMaxQuantizer, NVFP4Quantizer, TableQuantizer
from tests.export import exported
from tests.export.exported import logits, quantization, same_codes, same_files, token_ids
from tests.models import SIZES

FP8 = partial(MinMaxQuantizer, bits=8, format="fp8_e4m3", scale_dtype="float32")
STATIC = partial(FP8, granularity="per_tensor", dynamic=False)
TOKEN = partial(FP8, granularity="per_token")
SCHEMES = {
    "FP8": {"weight": partial(FP8, granularity="per_tensor"), "input": STATIC},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weight": FP8, "input": TOKEN},
    "W4A16_NVFP4": {"weight": NVFP4Quantizer},
    "W4A16_AWQ": {"weight": partial(LSQQuantizer, bits=4, granularity="per_group_64")},
    "W8A16": {"weight": partial(LSQQuantizer, bits=8, granularity="per_channel")},
}
MODELS = {"llama, tied": exported.MODELS["llama, tied"], "qwen, with biases": lambda: wide_qwen()}
LAYER = "model.layers.0.mlp.down_proj"
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.fixture
def target():
    """Without the question whether engines fuse layers."""
    return Checkpoint(ModelOpt(separate_scales=True))


def wide_qwen():
    """Groups of 64 divide its rows."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES | {"intermediate_size": 128}))


def quantized(name, algorithm, dtype=torch.bfloat16, **options):
    """The model `name`, calibrated and converted, on the grids of an algorithm."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    prepared = qat.prepare(model, qat.Scheme(**SCHEMES[algorithm], **options))
    if algorithm == "FP8":
        qat.calibrate(prepared, [{"input_ids": token_ids()}])
    return qat.convert(prepared)


@pytest.mark.parametrize("algorithm", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name, algorithm, target, tmp_path):
    """The same codes and scales, those of inputs too, the same logits, and written again the same bytes."""
    model = quantized(name, algorithm)
    read = target.read(target.write(model, tmp_path / "one"))
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)
    own, other = model.state_dict(), read.state_dict()
    assert all(torch.equal(own[key], other[key]) for key in own if "input_quantizer" in key)
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


def as_described(files, algorithm):
    """A weight of `LAYER` in float32 by its row and column, as ModelOpt's exporter packs it."""
    weight, scale = files[f"{LAYER}.weight"], files[f"{LAYER}.weight_scale"]

    def int4(r, c):
        nibble = int(weight[r // 2, c]) >> 4 * (r % 2) & 15
        return (nibble - 16 if nibble > 7 else nibble) * scale[r, c // 64].float()

    def nvfp4(r, c):
        value = E2M1[int(weight[r, c // 2]) >> 4 * (c % 2) & 15]
        return value * (scale[r, c // 16].float() * files[f"{LAYER}.weight_scale_2"])

    return {
        "FP8": lambda r, c: weight[r, c].float() * scale,
        "FP8_PER_CHANNEL_PER_TOKEN": lambda r, c: weight[r, c].float() * scale[r],
        "W4A16_NVFP4": nvfp4,
        "W4A16_AWQ": int4,
        "W8A16": lambda r, c: weight[r, c].float() * scale[r].float(),
    }[algorithm]


EXPECTED = {
    "FP8": {
        "weight": (torch.float8_e4m3fn, [64, 128]),
        "weight_scale": (torch.float32, []),
        "input_scale": (torch.float32, []),
    },
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "weight": (torch.float8_e4m3fn, [64, 128]),
        "weight_scale": (torch.float32, [64]),
    },
    "W4A16_NVFP4": {
        "weight": (torch.uint8, [64, 64]),
        "weight_scale": (torch.float8_e4m3fn, [64, 8]),
        "weight_scale_2": (torch.float32, []),
    },
    "W4A16_AWQ": {
        "weight": (torch.uint8, [32, 128]),
        "weight_scale": (torch.bfloat16, [64, 2]),
        "pre_quant_scale": (torch.bfloat16, [128]),
    },
    "W8A16": {"weight": (torch.int8, [64, 128]), "weight_scale": (torch.bfloat16, [64])},
}


@pytest.mark.parametrize("algorithm", SCHEMES)
def test_the_tensors_are_those_of_the_format(algorithm, target, tmp_path):
    model = quantized("llama, tied", algorithm)
    files = load_file(target.write(model, tmp_path / "modelopt") / "model.safetensors")
    found = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in files.items() if name.startswith(LAYER)}
    assert {leaf: (tensor.dtype, list(tensor.shape)) for leaf, tensor in found.items()} == EXPECTED[algorithm]
    q = model.get_submodule(LAYER).weight.quantized()
    values = replace(q, dtype=torch.float32).dequantize()
    value = as_described(files, algorithm)
    for row in range(0, 64, 3):
        for column in range(0, 128, 7):
            assert value(row, column) == values[row, column]
    if algorithm == "FP8":
        assert found["input_scale"] == model.get_submodule(LAYER).input_quantizer.scale
    if algorithm == "W4A16_AWQ":
        assert (found["pre_quant_scale"] == 1).all()


@pytest.mark.parametrize("algorithm", SCHEMES)
def test_what_the_configs_say(algorithm, target, tmp_path):
    """The nested form in a file of its own, the flat one in config.json: engines read the one or the other."""
    folder = target.write(quantized("llama, tied", algorithm, exclude=["*.0.mlp.up_proj"]), tmp_path / "modelopt")
    others = ["model.layers.0.mlp.up_proj", "lm_head"]
    size = {"W4A16_NVFP4": {"group_size": 16}, "W4A16_AWQ": {"group_size": 64}}.get(algorithm, {})
    factors = {"has_zero_point": False, "pre_quant_scale": True} if algorithm == "W4A16_AWQ" else {}
    own = json.loads((folder / "hf_quant_config.json").read_text())
    assert own["producer"]["name"] == "modelopt"
    assert own["quantization"] == {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "exclude_modules": others,
        **size,
        **factors,
    }
    flat = quantization(folder)
    assert (flat["quant_method"], flat["quant_algo"], flat["ignore"]) == ("modelopt", algorithm, others)
    assert flat["producer"] == own["producer"]
    group = flat["config_groups"]["group_0"]
    weights = {"dynamic": False, "num_bits": 4 if "4" in algorithm[:2] else 8, "type": "float"}
    weights |= {"type": "int"} if algorithm in ("W4A16_AWQ", "W8A16") else {}
    assert group["weights"] == weights | size
    inputs = {"FP8": False, "FP8_PER_CHANNEL_PER_TOKEN": True}
    assert ("input_activations" in group) == (algorithm in inputs)
    if algorithm in inputs:
        assert group["input_activations"] == {"dynamic": inputs[algorithm], "num_bits": 8, "type": "float"}
    read = target.read(folder)
    assert type(read.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear


def meta(name="llama, tied", **scheme):
    with torch.device("meta"):
        model = MODELS[name]()
    return qat.prepare(model, qat.Scheme(**scheme), initialize=False)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weight": partial(TableQuantizer)}, "codebook16 codes.*quantizer@scheme.weight=lsq"),
        ({"weight": partial(LSQQuantizer, bits=3)}, "3 bits.*scheme.weight.bits=4"),
        (
            {"weight": partial(LSQQuantizer, bits=4, granularity="per_group_64", symmetric=False)},
            "zero points.*scheme.weight.symmetric=true",
        ),
        ({"weight": partial(LSQQuantizer, bits=4, granularity="per_group_32")}, "per_group_32.*=per_group_64"),
        ({"weight": partial(LSQQuantizer, bits=8, granularity="per_group_32")}, "per_group_32.*=per_channel"),
        ({"weight": partial(FP8, granularity="per_group_64"), "input": TOKEN}, "per_group_64.*=per_channel"),
        ({"weight": FP8}, "inputs in full precision.*quantizer@scheme.input=fp8_token"),
        ({"weight": FP8, "input": STATIC}, "static fp8_e4m3 inputs per_tensor.*quantizer@scheme.input=fp8_token"),
        (
            {"weight": partial(FP8, granularity="per_tensor"), "input": TOKEN},
            "dynamic fp8_e4m3 inputs per_token.*quantizer@scheme.input=fp8_static",
        ),
        ({"weight": partial(FP8, scale_dtype="bfloat16"), "input": TOKEN}, "not float32.*scale_dtype=float32"),
        ({"weight": NVFP4Quantizer, "input": TOKEN}, "fp8_e4m3 inputs.*quantizer@scheme.input=none"),
        ({"weight": partial(NVFP4Quantizer, granularity="per_group_32")}, "per_group_32.*granularity=per_group_16"),
        ({"weight": partial(MicroscalingQuantizer)}, "not those of NVFP4.*quantizer@scheme.weight=nvfp4"),
        ({"weight": partial(MinMaxQuantizer, format="fp8_e5m2"), "input": TOKEN}, "fp8_e5m2 codes.*weight=fp8"),
        (SCHEMES["W8A16"] | {"embedding": True}, "embedding layer.*scheme.embedding=false"),
        (SCHEMES["W8A16"] | {"kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
        (
            SCHEMES["W8A16"] | {"rules": {"down": qat.Rule("*.down_proj", **SCHEMES["W4A16_AWQ"])}},
            r"this model.*several kinds: W4A16_AWQ in groups of 64, W8A16\. .*~scheme\.rules",
        ),
    ],
)
def test_what_it_cannot_hold_is_refused_before_training(scheme, message, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    with pytest.raises(InputError, match=message):
        target.check(meta(**scheme))


def test_layers_that_are_stored_transposed_are_refused(target):
    with torch.device("meta"):
        model = exported.MODELS["gpt2, transposed"]()
    qat.prepare(model, qat.Scheme(**SCHEMES["W8A16"]), initialize=False)
    with pytest.raises(InputError, match=r"c_attn, which has weights that its model stores transposed.*export=native"):
        target.check(model)


@pytest.mark.parametrize("algorithm", SCHEMES)
def test_scales_of_layers_that_engines_fuse(algorithm):
    """One scale for the weight of each of q, k and v is none that engines have; one for all of them is."""
    strict = Checkpoint(ModelOpt())
    fused = nn.ModuleDict({"qkv_proj": nn.Linear(64, 192), "down_proj": nn.Linear(64, 64)})
    strict.check(qat.prepare(fused, qat.Scheme(**SCHEMES[algorithm]), initialize=False))
    if algorithm not in ("FP8", "W4A16_NVFP4"):
        strict.check(meta(**SCHEMES[algorithm]))
        return
    with pytest.raises(InputError, match=r"a scale of its own for each of .*q_proj, .*k_proj, .*separate_scales=true"):
        strict.check(meta(**SCHEMES[algorithm]))


def test_inputs_of_fused_layers_share_a_scale():
    """They are calibrated on the same numbers; where they were changed since, engines would take the largest."""
    model = quantized("llama, tied", "FP8")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, qat.nn.PackedLinear)}
    assert ModelOpt().config(layers, [])["quant_algo"] == "FP8"
    layers["model.layers.1.self_attn.k_proj"].input_quantizer.scale.mul_(2)
    with pytest.raises(InputError, match=r"1.self_attn.q_proj, .*v_proj have scales of their inputs that differ"):
        ModelOpt().config(layers, [])


@pytest.mark.parametrize(
    ("algorithm", "leaf", "change", "message"),
    [
        ("FP8", "weight_scale", lambda _: None, "down_proj.weight is torch.float8_e4m3fn, which are codes"),
        ("FP8", "input_scale", lambda _: None, "down_proj has no tensor input_scale"),
        ("FP8", "weight", torch.Tensor.bfloat16, "weight is torch.bfloat16, not torch.float8_e4m3fn"),
        ("FP8", "weight_scale", lambda t: t.repeat(2), r"weight_scale is \[2\].*\[1\]"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "weight_scale", lambda t: t[1:].clone(), r"weight_scale is \[63\].*\[64\]"),
        ("W8A16", "weight_scale", lambda _: None, "down_proj.weight is torch.int8, which are codes"),
        ("W4A16_NVFP4", "weight_scale_2", lambda _: None, "has no tensor weight_scale_2"),
        ("W4A16_NVFP4", "weight_scale", torch.Tensor.float, "weight_scale is torch.float32"),
        ("W4A16_NVFP4", "weight", lambda t: t[:, :-2].clone(), "124 columns, which groups of 16 do not divide"),
        ("W4A16_AWQ", "weight", lambda t: t[:-1].clone(), r"weight_scale is \[64, 2\].*\[62, 2\]"),
        ("W4A16_AWQ", "pre_quant_scale", lambda t: t * 2, "multiplies its inputs"),
        ("W8A16", "weight", lambda t: t[:, :64].clone(), r"is \[64, 64\], and its config.json says \[64, 128\]"),
    ],
)
def test_damaged_tensors_are_refused(algorithm, leaf, change, message, target, tmp_path):
    folder = target.write(quantized("llama, tied", algorithm), tmp_path / "modelopt")
    tensors = load_file(folder / "model.safetensors")
    name = f"{LAYER}.{leaf}"
    tensors[name] = change(tensors[name])
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=message):
        target.read(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_algo": "NVFP4_AWQ"}, "quant_algo=NVFP4_AWQ; only FP8 or"),
        ({"quant_algo": "W8A16"}, "weight is torch.uint8, not torch.int8"),
        ({"group_size": 128}, r"weight_scale is \[64, 2\].*\[64, 1\]"),
        ({"group_size": 32}, "group_size=32; only 64 or 128"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "kv_cache_scheme=.*; only None can be read"),
        ({"quant_method": "fp8"}, "is no ModelOpt checkpoint.*fp8"),
    ],
    ids=["algorithm", "other algorithm", "groups", "unknown groups", "kv", "method"],
)
def test_a_config_that_says_something_else_is_refused(said, message, target, tmp_path):
    folder = target.write(quantized("llama, tied", "W4A16_AWQ"), tmp_path / "modelopt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        target.read(folder)
