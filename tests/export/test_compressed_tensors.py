"""Checkpoints of compressed-tensors: what the library computes from them, and back."""

from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.layouts.compressed_tensors import CompressedTensors
from qat.export.tensor_files import TensorFiles
from qat.quantizers import (
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
)
from tests.export.exported import MODELS, converted, logits, quantization, same_codes, same_files, token_ids

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

Lsq, MinMax = LSQQuantizer, MinMaxQuantizer
E4M3 = partial(MinMax, format="fp8_e4m3")
# Formats of weights alone: (weight, the name of the format).
WEIGHTS = {
    "w4a16": (partial(Lsq, bits=4, granularity="per_group_32"), "pack-quantized"),
    "w4a16, asymmetric": (partial(Lsq, bits=4, granularity="per_group_32", symmetric=False), "pack-quantized"),
    "w8a16": (partial(MinMax, bits=8, granularity="per_channel"), "pack-quantized"),
    "w8a16, asymmetric": (partial(MinMax, bits=8, granularity="per_channel", symmetric=False), "pack-quantized"),
    "w3a16, asymmetric": (partial(MinMax, bits=3, granularity="per_channel", symmetric=False), "pack-quantized"),
    "fp8": (partial(E4M3, granularity="per_channel"), "float-quantized"),
    "fp8 tensor": (partial(E4M3, granularity="per_tensor"), "float-quantized"),
    "fp8 blocks": (partial(E4M3, granularity="per_block_16x32"), "float-quantized"),
    "mxfp4": (partial(MicroscalingQuantizer, format="fp4_e2m1"), "mxfp4-pack-quantized"),
    "mxfp6": (partial(MicroscalingQuantizer, format="fp6_e2m3"), "mxfp6-pack-quantized"),
    "mxfp8": (partial(MicroscalingQuantizer, format="fp8_e4m3"), "mxfp8-quantized"),
    "nvfp4": (NVFP4Quantizer, "nvfp4-pack-quantized"),
}
W8 = partial(MinMax, bits=8, granularity="per_channel")
W4 = partial(Lsq, bits=4, granularity="per_group_32")
W4_ASYMMETRIC = partial(Lsq, bits=4, granularity="per_group_32", symmetric=False)
FP8 = WEIGHTS["fp8"][0]
TOKEN = partial(MinMax, bits=8, granularity="per_token", scale_dtype="float32")
STATIC = partial(MinMax, bits=8, granularity="per_tensor", dynamic=False)
# With quantized inputs: (weight, input, the name of the format).
INPUTS = {
    "w8a8": (W8, TOKEN, "int-quantized"),
    "w8a8, asymmetric": (W8, partial(TOKEN, symmetric=False), "int-quantized"),
    "w8a8, tensor": (partial(W8, granularity="per_tensor"), partial(TOKEN, granularity="per_tensor"), "int-quantized"),
    "w8a8, groups": (W8, partial(TOKEN, granularity="per_group_32", scale_dtype="bfloat16"), "int-quantized"),
    "w8a8, static": (W8, STATIC, "int-quantized"),
    "w8a8, static and asymmetric": (W8, partial(STATIC, symmetric=False), "int-quantized"),
    "w8a8, learned": (W8, partial(Lsq, bits=8, granularity="per_tensor"), "int-quantized"),
    "w4a8": (W4, TOKEN, "int-quantized"),
    "w4a8, asymmetric": (W4_ASYMMETRIC, TOKEN, "int-quantized"),
    "w4a4": (W4, partial(TOKEN, bits=4), "int-quantized"),
    "fp8": (FP8, partial(E4M3, granularity="per_token", scale_dtype="float32"), "float-quantized"),
    "fp8, static": (
        WEIGHTS["fp8 tensor"][0],
        partial(E4M3, granularity="per_tensor", dynamic=False),
        "float-quantized",
    ),
    "w4afp8": (W4, partial(E4M3, granularity="per_token", scale_dtype="float32"), "int-quantized"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def target():
    return Checkpoint(CompressedTensors())


def calibrated(name, weight, dtype=torch.float32, **scheme):
    """As `converted`, with static inputs."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = qat.prepare(model, qat.Scheme(weight=weight, **scheme))
    qat.calibrate(model, [{"input_ids": token_ids(), "use_cache": False}])
    return qat.convert(model)


def loaded(folder, dequantize=False, **options):
    """The checkpoint as transformers reads it with the library: decompressed when it first runs, or at once."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if dequantize:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def weights_that_differ(model, theirs):
    """The layers whose dequantized weights the library finds otherwise, bit by bit."""
    theirs(input_ids=token_ids(), use_cache=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, qat.nn.PackedLinear)}
    assert layers
    pairs = {name: (theirs.get_submodule(name).weight, layer.weight.dequantize()) for name, layer in layers.items()}
    return [name for name, (one, other) in pairs.items() if one.dtype != other.dtype or not torch.equal(one, other)]


def holds(weight, dtype):
    """Only bfloat16 has the values of NVFP4 in the library."""
    return weight != "nvfp4" or dtype == "bfloat16"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["llama, tied", "qwen, with biases"])
def test_what_is_written_is_read_back(name, weight, dtype, target, tmp_path):
    """The same codes and scales in the same dtypes, the same logits, and written again the same bytes."""
    if not holds(weight, dtype):
        return
    quantizer, format = WEIGHTS[weight]
    model = converted(name, quantizer, DTYPES[dtype])
    read = target.read(target.write(model, tmp_path / "one"))
    assert quantization(tmp_path / "one")["format"] == format
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [weight for weight in WEIGHTS if "asymmetric" not in weight])
@pytest.mark.parametrize("name", ["llama, tied", "qwen, with biases"])
def test_the_library_computes_the_same(name, weight, dtype, target, tmp_path):
    """Bit by bit: weights and logits, whether it decompresses when the model first runs or when it is loaded."""
    if not holds(weight, dtype):
        return
    model = converted(name, WEIGHTS[weight][0], DTYPES[dtype])
    folder = target.write(model, tmp_path / "checkpoint")
    # The library multiplies microscaling in bfloat16 only, unless it dequantizes at once.
    for dequantize in (False, True) if not weight.startswith("mx") or dtype == "bfloat16" else (True,):
        theirs = loaded(folder, dequantize)
        assert weights_that_differ(model, theirs) == []
        assert torch.equal(logits(theirs, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [weight for weight in WEIGHTS if "asymmetric" in weight])
def test_packed_zero_points_are_dequantized_alike(weight, dtype, target, tmp_path):
    """By `dequantize=True`: version 0.20.1 gives unpacked zero points the place of packed ones on the meta device, so
    that transformers 5.23 cannot read such checkpoints otherwise, whoever wrote them.
    """
    model = converted("llama, tied", WEIGHTS[weight][0], DTYPES[dtype])
    theirs = loaded(target.write(model, tmp_path / "checkpoint"), dequantize=True)
    assert weights_that_differ(model, theirs) == []
    assert torch.equal(logits(theirs, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_is_packed_as_the_library_packs(bits, symmetric, target, tmp_path):
    """The library's own compressor, given our weights and scales, writes the same tensors; 96 columns of 7 bits."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantizer = partial(Lsq, bits=bits, granularity="per_group_32", symmetric=symmetric)
    model = converted("qwen, with biases", quantizer)
    files = TensorFiles(target.write(model, tmp_path / "checkpoint"))
    (group,) = quantization(tmp_path / "checkpoint")["config_groups"].values()
    compressor = BaseCompressor.get_value_from_registry(group.pop("format"))
    q = model.get_submodule(LAYER).weight.quantized()
    given = {"weight": q.dequantize(), "weight_scale": q.qparams.scale.float()}
    if not symmetric:
        given["weight_zero_point"] = (q.qparams.zero_point.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    for leaf, tensor in compressor.compress(given, QuantizationScheme.model_validate(group)).items():
        assert torch.equal(files[f"{LAYER}.{leaf}"], tensor)
        assert files[f"{LAYER}.{leaf}"].dtype == tensor.dtype


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_scales_come_back_in_their_dtype(scale_dtype, target, tmp_path):
    """They are stored in the dtype of a float32 model, in which the library then multiplies."""
    model = converted("llama, tied", partial(MinMax, bits=4, granularity="per_channel", scale_dtype=scale_dtype))
    folder = target.write(model, tmp_path / "checkpoint")
    assert TensorFiles(folder)[f"{LAYER}.weight_scale"].dtype == torch.float32
    assert weights_that_differ(model, loaded(folder)) == []
    assert same_codes(model, target.read(folder))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", INPUTS)
def test_inputs_are_read_back(case, dtype, target, tmp_path):
    weight, input, format = INPUTS[case]
    model = calibrated("qwen, with biases", weight, DTYPES[dtype], input=input)
    read = target.read(target.write(model, tmp_path / "one"))
    assert quantization(tmp_path / "one")["format"] == format
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)
    one, other = (m.get_submodule(LAYER).input_quantizer for m in (model, read))
    assert one.description == other.description
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))
