"""Checkpoints of compressed-tensors: what the library computes from them, and back."""

import json
import shutil
from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.consumers import NotInstalled
from qat.export.layouts.compressed_tensors import CompressedTensors, ints, nvfp4
from qat.export.tensor_files import TensorFiles
from qat.numerics.formats import FloatFormat
from qat.numerics.granularity import PerGroup, PerTensor
from qat.numerics.qtensor import QParams, QuantizedTensor
from qat.quantizers import (
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
)
from qat.transforms import KVCache
from tests.export.exported import MODELS, converted, logits, quantization, same_codes, same_files, token_ids

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

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
STATIC_FP8 = partial(E4M3, granularity="per_tensor", dynamic=False)
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
        STATIC_FP8,
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


# Of NVFP4 the library has the values in bfloat16 only.
CASES = [(weight, dtype) for weight in WEIGHTS for dtype in DTYPES if weight != "nvfp4" or dtype == "bfloat16"]


# Every format once for both dtypes, and some beside biases.
BIASES = [("w4a16, asymmetric", "float32"), ("fp8", "bfloat16"), ("mxfp8", "bfloat16"), ("nvfp4", "bfloat16")]
OF_MODELS = [("llama, tied", *case) for case in CASES] + [("qwen, with biases", *case) for case in BIASES]


@pytest.mark.parametrize(("name", "weight", "dtype"), OF_MODELS)
def test_what_is_written_is_read_back(name, weight, dtype, target, tmp_path):
    """The same codes and scales in the same dtypes, the same logits, and written again the same bytes."""
    quantizer, format = WEIGHTS[weight]
    model = converted(name, quantizer, DTYPES[dtype])
    read = target.read(target.write(model, tmp_path / "one"))
    assert quantization(tmp_path / "one")["format"] == format
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


@pytest.mark.parametrize(("name", "weight", "dtype"), [case for case in OF_MODELS if "asymmetric" not in case[1]])
def test_the_library_computes_the_same(name, weight, dtype, target, tmp_path):
    """Bit by bit: weights and logits, whether it decompresses when the model first runs or when it is loaded."""
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


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_rows_that_do_not_fill_words(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 2**bits, (5, 41), dtype=torch.uint8)
    packed = ints._pack(codes, bits)
    assert torch.equal(packed, pack_to_int32((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(ints._unpack(packed, bits, 41), codes)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_scales_come_back_in_their_dtype(scale_dtype, target, tmp_path):
    """They are stored in the dtype of a float32 model, in which the library then multiplies."""
    model = converted("llama, tied", partial(MinMax, bits=4, granularity="per_channel", scale_dtype=scale_dtype))
    folder = target.write(model, tmp_path / "checkpoint")
    assert TensorFiles(folder)[f"{LAYER}.weight_scale"].dtype == torch.float32
    assert weights_that_differ(model, loaded(folder)) == []
    assert same_codes(model, target.read(folder))


def test_a_float16_model(target, tmp_path):
    quantizer = partial(Lsq, bits=4, granularity="per_group_32", scale_dtype="float16")
    model = converted("llama, tied", quantizer, torch.float16)
    folder = target.write(model, tmp_path / "checkpoint")
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", INPUTS)
def test_the_library_quantizes_inputs_nearly_alike(case, dtype, target, tmp_path):
    """To the bit where scales are stored and the model is in float32.

    Else the library finds scales by max|x| / 127.5 for int8, where they are max|x| / 127 here, in the dtype of x, and
    rounds x / scale to that dtype before it rounds to a code. Each is off by less than a step, as quantization itself
    is by half of one: so logits are no further from ours than twice what quantizing inputs changes.
    """
    weight, input, _ = INPUTS[case]
    model = calibrated("qwen, with biases", weight, DTYPES[dtype], input=input)
    theirs = loaded(target.write(model, tmp_path / "checkpoint"))
    assert weights_that_differ(model, theirs) == []
    plain = calibrated("qwen, with biases", weight, DTYPES[dtype])
    ours, found, full = (logits(m, token_ids()).float() for m in (model, theirs, plain))
    assert (found - ours).norm() < 2 * (full - ours).norm()
    if dtype == "float32" and ("static" in case or "learned" in case):
        assert torch.equal(found, ours)
    elif dtype == "float32" and "fp8" in case:  # scales differ by one float at most
        torch.testing.assert_close(found, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "fp8"])
def test_dynamic_scales_of_the_library(kind):
    """max|x| / 127.5 instead of / 127; the same to the bit with zero points; fp8 within the last bit."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(0))
    options = {"type": "float"} if kind == "fp8" else {"symmetric": kind == "symmetric"}
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, **options)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, None)
    quantizer = partial(E4M3, granularity="per_token") if kind == "fp8" else partial(TOKEN, **options)
    ours = quantizer((64,), scale_dtype="float32").qparams(x)
    if kind == "asymmetric":
        assert torch.equal(scale, ours.scale)
        assert torch.equal(zero_point + 128.0, ours.zero_point)
    else:
        highest = (127.5, 127) if kind == "symmetric" else (448, 448)
        torch.testing.assert_close(scale * highest[0], ours.scale * highest[1], rtol=2.5e-7, atol=0)


def test_the_words_are_those_of_the_format(target, tmp_path):
    """Decoded one code at a time: 32 / b codes in a word would be another format for 3 bits."""
    model = converted("llama, tied", WEIGHTS["w3a16, asymmetric"][0])
    files = TensorFiles(target.write(model, tmp_path / "checkpoint"))
    q = model.get_submodule(LAYER).weight.quantized()
    rows, columns = q.shape
    packed, scale, zeros, shape = (
        files[f"{LAYER}.weight_{leaf}"] for leaf in ("packed", "scale", "zero_point", "shape")
    )
    assert shape.tolist() == [rows, columns]
    assert packed.shape == (rows, columns * 3 // 32)
    assert zeros.shape == (rows * 3 // 32, 1)

    def code(words, i):
        stream = sum(int(word) % 2**32 << 32 * place for place, word in enumerate(words))
        return stream >> 3 * i & 7

    for row in range(0, rows, 7):
        for column in range(0, columns, 5):
            value = (code(packed[row], column) - code(zeros[:, 0], row)) * scale[row, 0]
            assert value == q.dequantize()[row, column]


def test_layers_of_several_grids_and_without_any(target, tmp_path):
    """Each has its group, and its format; the library reads all."""
    rules = {
        "down": qat.Rule("*.down_proj", weight=FP8, input=INPUTS["fp8"][1]),
        "up": qat.Rule("*.up_proj", weight=W8),
        "one": qat.Rule("*.0.mlp.gate_proj", weight=W8, input=TOKEN),
    }
    model = converted("llama, tied", W4, rules=rules, exclude=["*.1.mlp.gate_proj"])
    folder = target.write(model, tmp_path / "one")
    config = quantization(folder)
    assert config["format"] == "mixed-precision"
    assert [(group["format"], group["weights"]["num_bits"]) for group in config["config_groups"].values()] == [
        ("pack-quantized", 4), ("int-quantized", 8), ("pack-quantized", 8), ("float-quantized", 8)
    ]  # fmt: skip
    assert config["config_groups"]["group_1"]["targets"] == ["model.layers.0.mlp.gate_proj"]
    assert config["ignore"] == ["model.layers.1.mlp.gate_proj", "lm_head"]
    theirs, read = loaded(folder), target.read(folder)
    assert weights_that_differ(model, theirs) == []
    assert same_codes(model, read)
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_files(folder, target.write(read, tmp_path / "two"))


def test_a_quantized_head(target, tmp_path):
    model = converted("qwen, with biases", W4, head=True)
    folder = target.write(model, tmp_path / "checkpoint")
    assert quantization(folder)["ignore"] == []
    theirs, read = loaded(folder), target.read(folder)
    assert weights_that_differ(model, theirs) == []
    assert torch.equal(logits(theirs, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (partial(TableQuantizer, bits=4), {}, "codebook16 codes.*quantizer@scheme.weight=lsq"),
        (partial(Lsq, granularity="per_tensor"), {}, "per_tensor.*granularity=per_channel"),
        (partial(Lsq, granularity="per_block_16x16"), {}, "per_block_16x16.*granularity=per_channel"),
        (partial(Lsq, bits=2, grid="stretched"), {}, "levels4 codes.*quantizer@scheme.weight=lsq"),
        (partial(MinMax, format="fp8_e5m2"), {}, "fp8_e5m2 codes.*format=fp8_e4m3"),
        (partial(MinMax, format="fp6_e2m3"), {}, "fp6_e2m3 codes.*weight=fp8 scheme.weight.bits=8"),
        (partial(MinMax, format="fp4_e2m1"), {}, "fp8_e4m3 with one for the tensor.*weight=nvfp4"),
        (partial(MicroscalingQuantizer, granularity="per_group_16"), {}, "per_group_16.*granularity=per_group_32"),
        (partial(MicroscalingQuantizer, format="fp6_e3m2"), {}, "fp6_e3m2.*format=fp6_e2m3"),
        (partial(MicroscalingQuantizer, format="fp8_e5m2"), {}, "fp8_e5m2.*format=fp8_e4m3"),
        (NVFP4Quantizer, {}, "not bfloat16.*model.dtype=bfloat16"),
        (MicroscalingQuantizer, {"input": TOKEN}, "a quantized input.*input=none"),
        (FP8, {"input": TOKEN}, "int8 beside.*input=fp8_token"),
        (W8, {"input": MicroscalingQuantizer}, "inputs in fp4_e2m1.*input=minmax_token scheme.input.bits=8"),
        (FP8, {"input": partial(MicroscalingQuantizer, format="fp8_e4m3")}, "rule microscaling.*input=fp8_token"),
        (W8, {"input": partial(TOKEN, bits=6)}, "inputs of 6 bits.*input.bits=8"),
        (W8, {"input": partial(STATIC, granularity="per_channel_-1")}, "static input scales.*granularity=per_tensor"),
        (W8, {"output": TOKEN}, "quantized output.*output=none"),
        (W4, {"embedding": True}, "embedding layer.*scheme.embedding=false"),
        (W4, {"kv": KVCache(TOKEN, TOKEN)}, "the KV cache of .*not static and per_tensor.*kv.key=fp8_static"),
        (W4, {"kv": KVCache(STATIC)}, "other keys or values"),
        (W4, {"kv": KVCache(STATIC, STATIC_FP8)}, "other keys or values.*int8, for both.*kv.value=fp8_static"),
        (W4, {"kv": KVCache(STATIC, partial(STATIC, symmetric=False))}, "other keys or values"),
        (W4, {"kv": KVCache(STATIC, STATIC, window=8)}, "8 tokens in full precision.*kv.window=0"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused_before_training(weight, options, message, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    with torch.device("meta"):
        model = MODELS["llama, tied"]()
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (partial(W8, scale_dtype="float32"), {}, "a bfloat16 model rounds.*weight.scale_dtype=bfloat16"),
        (partial(W8, scale_dtype="float16"), {}, "a bfloat16 model rounds.*weight.scale_dtype=bfloat16"),
        (W8, {"input": partial(STATIC, scale_dtype="float32")}, "input.scale_dtype=bfloat16"),
        (W8, {"input": partial(TOKEN, scale_dtype="float16")}, "input.scale_dtype=float32"),
        (W8, {"kv": KVCache(STATIC, partial(STATIC, scale_dtype="float32"))}, "kv.value.scale_dtype=bfloat16"),
    ],
)
def test_scales_that_the_library_would_round_are_refused(weight, options, message, target):
    with torch.device("meta"):
        model = MODELS["llama, tied"]().to(torch.bfloat16)
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


def test_transposed_layers_are_refused(target):
    """The library quantizes nn.Linear; what GPT-2 has instead it would leave out in silence."""
    model = qat.prepare(MODELS["gpt2, transposed"](), qat.Scheme(weight=W4))
    with pytest.raises(InputError, match=r"stores transposed.*export=native"):
        target.check(model)


def said(num_bits, type="int", strategy="group", group_size=None, symmetric=True, dynamic=False, **others):
    """A grid as llm-compressor writes it, with all that it leaves null."""
    return {
        "actorder": None, "block_structure": None, "dynamic": dynamic, "group_size": group_size, "num_bits": num_bits,
        "observer": None if dynamic else "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": symmetric,
        "type": type, **others,
    }  # fmt: skip


# Checkpoints of other tools: (format, weights, input_activations).
FOREIGN = {
    "w4a16": ("pack-quantized", said(4, group_size=32), None),
    "w4a16, asymmetric": ("pack-quantized", said(4, group_size=32, symmetric=False), None),
    "w8a16": ("pack-quantized", said(8, strategy="channel"), None),
    "w8a8": ("int-quantized", said(8, strategy="channel"), said(8, strategy="token", dynamic=True)),
    "fp8": ("float-quantized", said(8, "float", "channel"), said(8, "float", "token", dynamic=True)),
    "nvfp4": (
        "nvfp4-pack-quantized",
        said(4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn", zp_dtype="torch.float8_e4m3fn"),
        None,
    ),
    "mxfp4": ("mxfp4-pack-quantized", said(4, "float", "group", 32, scale_dtype="torch.uint8"), None),
}


def written_elsewhere(kind, folder):
    """A bfloat16 checkpoint that the library's compressors made, with a config in the style of llm-compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from safetensors.torch import save_file

    format, weights, inputs = FOREIGN[kind]
    group = {"format": format, "input_activations": inputs, "output_activations": None, "targets": ["Linear"]}
    scheme = QuantizationScheme.model_validate(group | {"weights": weights})
    torch.manual_seed(0)
    model = MODELS["llama, tied"]().to(torch.bfloat16)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
            continue
        weight = tensors.pop(f"{name}.weight")
        blocks = weight.unflatten(1, (-1, weights["group_size"] or weight.shape[1]))
        own = {"weight": weight}
        if weights["strategy"] == "tensor_group":
            own["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
        extremes = blocks.amin(-1), blocks.amax(-1)
        own["weight_scale"], own["weight_zero_point"] = calculate_qparams(
            *extremes, scheme.weights, own.get("weight_global_scale")
        )
        compressed = BaseCompressor.get_value_from_registry(format).compress(own, scheme)
        tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in compressed.items()}
    model.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "config_groups": {"group_0": group | {"weights": weights}}, "format": format, "global_compression_ratio": None,
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
        "quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}, "version": "0.20.1",
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Copies a checkpoint of `written_elsewhere` to a folder."""
    made = {}

    def copied(kind, folder):
        if kind not in made:
            made[kind] = written_elsewhere(kind, tmp_path_factory.mktemp("elsewhere"))
        return shutil.copytree(made[kind], folder, dirs_exist_ok=True)

    return copied


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_of_other_tools_are_read(kind, elsewhere, target, tmp_path):
    """To what the library makes of them, bit by bit; and what was read can be written."""
    folder = elsewhere(kind, tmp_path)
    read = target.read(folder)
    theirs = loaded(folder, dequantize="asymmetric" in kind)
    assert weights_that_differ(read, theirs) == []
    if FOREIGN[kind][2] is None:
        assert torch.equal(logits(read, token_ids()), logits(theirs, token_ids()))
    else:
        assert read.get_submodule(LAYER).input_quantizer.rule == "absmax"
    again = target.read(target.write(read, tmp_path / "again"))
    assert same_codes(read, again)


def test_zero_points_of_symmetric_layers_say_nothing(elsewhere, target, tmp_path):
    """As early versions of the library stored them, where all are zero."""
    expected = target.read(elsewhere("w8a8", tmp_path))
    altered(tmp_path, {"weight_zero_point": torch.zeros(64, 1, dtype=torch.int8)})
    assert same_codes(expected, target.read(tmp_path))
    altered(tmp_path, {"weight_zero_point": torch.ones(64, 1, dtype=torch.int8)})
    with pytest.raises(InputError, match="has weight_zero_point, which"):
        target.read(tmp_path)


def altered(folder, tensors=None, layer=LAYER, **config):
    """`folder` with other tensors of `layer` and other entries of its quantization_config; None takes one out."""
    from safetensors.torch import load_file, save_file

    found = load_file(folder / "model.safetensors")
    for leaf, tensor in (tensors or {}).items():
        found.pop(f"{layer}.{leaf}", None)
        if tensor is not None:
            found[f"{layer}.{leaf}"] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    whole["quantization_config"] |= config
    path.write_text(json.dumps(whole))
    return folder


def one_group(kind, **changes):
    """`config_groups` of a checkpoint of `kind`, its weights described otherwise."""
    format, weights, inputs = FOREIGN[kind]
    group = {"format": format, "targets": ["Linear"], "input_activations": inputs, "weights": weights | changes}
    return {"config_groups": {"group_0": group}}


NO_NUMBERS = torch.full((64, 4), float("nan"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "message"),
    [
        ("w4a16", {"weight_g_idx": torch.zeros(128, dtype=torch.int32)}, {}, "weight_g_idx.*actorder=null"),
        ("w4a16", {}, one_group("w4a16", actorder="group"), "order of their activations.*actorder=null"),
        ("w4a16", {}, {"kv_cache_scheme": said(8, "float", "tensor")}, "do not agree on whether its cache"),
        ("w4a16", {}, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config, which is not read"),
        ("w4a16", {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config, which is not read"),
        ("w4a16", {}, {"quantization_status": "frozen"}, "not compressed"),
        ("w4a16", {}, {"ignore": ["re:.*down_proj"]}, "says that it is not"),
        ("w4a16", {}, {"config_groups": {"W4A16": ["Linear"]}}, "no config_groups that say weights"),
        ("w4a16", {}, {"config_groups": {}}, "no group for it"),
        ("w4a16", {}, {"config_groups": {"g": {"format": "marlin-24", "targets": ["Linear"]}}}, "as 'marlin-24'"),
        ("w4a16", {}, {"config_groups": {"g": {"targets": ["Linear"]}}}, "weights in full precision"),
        ("w4a16", {}, {"config_groups": {"g": {"targets": ["re:(mlp"]}}}, "is no pattern"),
        ("w4a16", {}, one_group("w4a16", num_bits=3), "weight_packed is .* say"),
        ("w4a16", {}, one_group("w4a16", num_bits="four"), "config.json is damaged"),
        ("w4a16", {}, one_group("w4a16", group_size=64), "weight_scale is .* say"),
        ("w4a16", {}, one_group("w4a16", group_size=48), "does not divide 128|does not divide 64"),
        ("w4a16", {}, one_group("w4a16", symmetric=False), "has no weight_zero_point"),
        ("w4a16", {}, one_group("w4a16", strategy="attn_head"), "strategy 'attn_head'"),
        ("w4a16", {}, one_group("w4a16", type="float"), "type float and 4 bits"),
        ("w4a16, asymmetric", {}, one_group("w4a16"), "has weight_zero_point, which its config.json does not tell of"),
        ("w4a16", {"weight_scale": None}, {}, "has no weight_scale"),
        ("w4a16", {"weight_packed": None}, {}, "has no weight_packed"),
        ("w4a16", {"weight_shape": torch.tensor([64, 96])}, {}, "weight_packed is .* say"),
        ("w4a16", {"weight_scale": NO_NUMBERS}, {}, "scales that are not positive numbers"),
        ("w4a16", {"output_scale": torch.ones(1)}, {}, "has output_scale, which its config.json does not tell of"),
        ("w8a8", {"weight_scale": None}, {}, "which are codes, and the checkpoint has no scales"),
        ("w8a8", {}, one_group("w8a8", num_bits=4), "beyond the 4 bits"),
        ("fp8", {"weight": torch.full((64, 128), float("nan")).to(torch.float8_e4m3fn)}, {}, "holds NaN"),
        ("fp8", {}, one_group("fp8", type="int"), "only fp8_e4m3 is known"),
        ("fp8", {"weight_scale": torch.ones(64, 1, dtype=torch.int32)}, {}, "int32.*float32 is expected"),
        ("nvfp4", {"weight_global_scale": torch.zeros(1)}, {}, "global scale 0.0, which is no positive number"),
        ("nvfp4", {"weight_scale": torch.zeros(64, 8).to(torch.float8_e4m3fn)}, {}, "scales that are not positive"),
        ("nvfp4", {}, {"tensor_scales": {LAYER: 3.0}}, "disagree"),
        ("nvfp4", {}, {"tensor_scales": {LAYER: "3"}}, "tensor_scales are no numbers"),
        ("nvfp4", {}, one_group("nvfp4", group_size=32), "says something else of its grid"),
        ("mxfp4", {"weight_scale": torch.full((64, 4), 255, dtype=torch.uint8)}, {}, "scales that are NaN"),
        ("mxfp4", {"weight_packed": torch.zeros(64, 3, dtype=torch.uint8)}, {}, "fp4_e2m1 codes do not fill|does not"),
    ],
)  # fmt: skip
def test_what_is_damaged_or_contradicts_itself_is_refused(kind, tensors, config, message, elsewhere, target, tmp_path):
    folder = altered(elsewhere(kind, tmp_path), tensors, **config)
    with pytest.raises(InputError, match=message):
        target.read(folder)


def test_a_group_of_the_name_goes_before_a_pattern_and_the_class(elsewhere, target, tmp_path):
    """As in the library, whatever their order."""
    folder = elsewhere("w4a16", tmp_path)
    (group,) = quantization(folder)["config_groups"].values()
    wrong = group | {"weights": group["weights"] | {"num_bits": 2}}
    names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj")]
    groups = {
        "all": wrong | {"targets": ["Linear"]},
        "pattern": wrong | {"targets": ["re:.*layers.*"]},
        "names": group | {"targets": names},
        "attention": group | {"targets": ["re:.*[kqvo]_proj$"]},
    }
    expected = target.read(folder)
    altered(folder, config_groups=groups)
    assert same_codes(expected, target.read(folder))
    assert weights_that_differ(expected, loaded(folder)) == []


ALL_BLOCKS = torch.arange(1, 127, dtype=torch.uint8)  # codes of every positive fp8_e4m3 number


def nvfp4_tensor(tensor_scale):
    """Every code of NVFP4 in blocks of every scale."""
    second = QParams(tensor_scale.reshape(1, 1))
    scale = QuantizedTensor(ALL_BLOCKS[:, None], second, FloatFormat(4, 3), PerTensor(), torch.float32)
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(ALL_BLOCKS), 1)
    return QuantizedTensor(codes, QParams(scale), FloatFormat(2, 1), PerGroup(16), torch.bfloat16)


def test_scales_of_nvfp4_tensors_have_an_inverse():
    """By which the library's arithmetic, a division in float32, gives every code its value in bfloat16."""
    unfound = 0
    for tensor_scale in (torch.rand(300, generator=torch.Generator().manual_seed(0)) + 1) * 2**-11:
        q = nvfp4_tensor(tensor_scale)
        stored = nvfp4.global_scale(q, "a layer")
        blocks = ALL_BLOCKS[:, None].view(torch.float8_e4m3fn).to(torch.bfloat16)
        theirs = FloatFormat(2, 1).decode(q.codes) * (blocks / stored)
        assert torch.equal(theirs.to(torch.bfloat16), q.dequantize())
        back = nvfp4.tensor_scale(stored, ALL_BLOCKS, "a layer")
        trained = nvfp4.not_recovered(q, "a layer")
        assert back == tensor_scale if trained is None else trained == tensor_scale
        unfound += trained is not None
    assert 0 < unfound < 100


def test_a_scale_without_inverse_is_refused():
    """Short numbers put values in the middle of two others, where rounding has to go both ways."""
    refused = 0
    for tensor_scale in torch.arange(128, 256) / 2**19:
        try:
            nvfp4.global_scale(nvfp4_tensor(tensor_scale), "model.layers.7.mlp.up_proj")
        except InputError as error:
            refused += "model.layers.7.mlp.up_proj has a tensor scale for which no inverse" in str(error)
    assert refused == 8


def test_a_tensor_scale_that_does_not_follow_is_kept(target, tmp_path):
    model = converted("llama, tied", NVFP4Quantizer, torch.bfloat16)
    folder = target.write(model, tmp_path / "one")
    kept = quantization(folder)["tensor_scales"]
    assert kept
    assert kept == {name: float(model.get_submodule(name).weight.scale.scale) for name in kept}
    theirs, read = loaded(folder), target.read(folder)
    assert weights_that_differ(model, theirs) == []
    assert same_codes(model, read)
    assert same_files(folder, target.write(read, tmp_path / "two"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_static_caches(grid, dtype, target, tmp_path):
    """Read back to the bit; and in float32 the library's logits, and what it generates, are ours to the bit.

    In bfloat16 it rounds x / scale before it rounds to a code.
    """
    role = STATIC if grid == "int8" else STATIC_FP8
    model = calibrated("llama, tied", W4, DTYPES[dtype], kv=KVCache(role, role))
    folder = target.write(model, tmp_path / "one")
    read, theirs = target.read(folder), loaded(folder)
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_codes(model, read)
    assert same_files(folder, target.write(read, tmp_path / "two"))
    assert weights_that_differ(model, theirs) == []
    ours, found = logits(model, token_ids()), logits(theirs, token_ids())
    plain = logits(calibrated("llama, tied", W4, DTYPES[dtype]), token_ids())
    assert not torch.equal(ours, plain)
    if dtype == "bfloat16":
        assert (found - ours).norm() < 2 * (plain - ours).norm()
        return
    assert torch.equal(found, ours)
    generated = [m.generate(input_ids=token_ids(), max_new_tokens=6, do_sample=False) for m in (model, theirs)]
    assert torch.equal(*generated)


@pytest.fixture(scope="module")
def with_cache(tmp_path_factory):
    model = calibrated("llama, tied", W4, kv=KVCache(STATIC_FP8, STATIC_FP8))
    return Checkpoint(CompressedTensors()).write(model, tmp_path_factory.mktemp("with_cache") / "one")


@pytest.mark.parametrize(
    ("tensors", "scheme", "message"),
    [
        ({"k_scale": None}, {}, "has no k_scale"),
        ({"q_scale": torch.ones(1)}, {}, "has q_scale, which its config.json does not tell of"),
        ({"v_scale": torch.zeros(1)}, {}, "scales that are not positive"),
        ({}, None, "do not agree on whether its cache is quantized"),
        ({}, {"num_bits": 4}, "keys and values of .* are quantized in a way that is not read"),
        ({}, {"dynamic": True}, "keys and values of .* are quantized in a way that is not read"),
        ({}, {"strategy": "attn_head"}, "keys and values of .* are quantized in a way that is not read"),
    ],
)
def test_damaged_caches_are_refused(tensors, scheme, message, with_cache, target, tmp_path):
    folder = shutil.copytree(with_cache, tmp_path / "one")
    whole = quantization(folder)["kv_cache_scheme"]
    config = {"kv_cache_scheme": None if scheme is None else whole | scheme}
    altered(folder, tensors, layer="model.layers.1.self_attn", **config)
    with pytest.raises(InputError, match=message):
        target.read(folder)


def test_other_folders_are_refused(elsewhere, target, tmp_path):
    folder = elsewhere("w4a16", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        target.read(folder)
    (folder / "model.safetensors").write_bytes(whole)
    altered(folder, quant_method="gptq")
    with pytest.raises(InputError, match=r"no compressed-tensors checkpoint: the quant_method .* is gptq"):
        target.read(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["w4a16", "w4a16, asymmetric", "mxfp4"])
def test_the_engine_that_an_export_is_held_to(case, dtype, target, tmp_path):
    """transformers, which reads some formats only when it dequantizes them at once."""
    model = converted("llama, tied", WEIGHTS[case][0], DTYPES[dtype])
    consumer = target.consumer(target.write(model, tmp_path / "checkpoint"))
    assert "compressed-tensors 0." in consumer.name
    assert torch.equal(consumer.logits(token_ids()), logits(model, token_ids()))


def test_transformers_is_not_asked_for_what_it_dequantizes_wrongly(target, tmp_path):
    """It would take the first group for all layers."""
    rules = {"down": qat.Rule("*.down_proj", weight=W8)}
    model = converted("llama, tied", W4_ASYMMETRIC, rules=rules)
    with pytest.raises(NotInstalled, match="vLLM and SGLang"):
        target.consumer(target.write(model, tmp_path / "checkpoint"))
