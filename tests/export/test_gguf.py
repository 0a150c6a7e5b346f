"""GGUF files: read back to the bit, loaded by transformers, refused where the grid does not fit. llama.cpp itself is in
`test-engines`."""

import shutil
import struct
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import qat
from qat.errors import InputError
from qat.export.consumers import NotInstalled
from qat.export.gguf.blocks import BLOCK_TYPES
from qat.export.gguf.file import GgufFile
from qat.export.gguf.target import FILE, Gguf
from qat.export.parity import check_stored
from qat.nn import PackedEmbedding, PackedLinear
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
)
from tests.conftest import tiny_llama
from tests.export.exported import MODELS, converted, logits, same_codes, same_files, token_ids
from tests.models import SIZES, tiny_gpt2, tiny_mixtral

HALF = {"granularity": "per_group_32", "scale_dtype": "float16"}
WIDE = {"granularity": "per_group_256", "scale_dtype": "float16"}
WEIGHTS = {
    "Q4_0": partial(LSQQuantizer, bits=4, **HALF),
    "Q5_0": partial(MinMaxQuantizer, bits=5, **HALF),
    "Q8_0": partial(LSQQuantizer, bits=8, granularity="per_flat_group_32", scale_dtype="float16"),
    "MXFP4": partial(MicroscalingQuantizer),
}
TERNARY = {
    "levels": partial(LSQQuantizer, bits=2, grid="ternary", **WIDE),
    "table": partial(TableQuantizer, family="ternary", bits=2, rule="absmean", **WIDE),
}
WIDE_SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
TOKEN = partial(MinMaxQuantizer, granularity="per_token")
LAYER = "model.layers.0.mlp.down_proj"
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def target():
    return Gguf()


def quantized(model, weight=WEIGHTS["Q4_0"], **scheme):
    return qat.convert(qat.prepare(model.eval(), qat.Scheme(weight=weight, **scheme)))


def types_in(folder):
    """The type of every tensor of a file, as the package reads it."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / FILE).tensors}


def packed_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name, weight, dtype, target, tmp_path):
    """The same codes and scales, the same logits, and written again the same bytes."""
    model = converted(name, WEIGHTS[weight], dtype)
    read = target.read(target.write(model, tmp_path / "one"))
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert weight == "Q8_0" or same_codes(model, read)  # flat groups of whole rows come back as groups of rows
    check_stored(model, read)
    assert weight in types_in(tmp_path / "one").values()
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("weight", TERNARY)
def test_ternary_weights(weight, kind, tmp_path):
    target = Gguf(ternary=kind)
    model = quantized(tiny_llama(**WIDE_SIZES), TERNARY[weight])
    read = target.read(target.write(model, tmp_path / "one"))
    assert types_in(tmp_path / "one")["blk.0.attn_q.weight"] == kind
    check_stored(model, read)  # a table comes back as levels, which are the same numbers
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


def test_types_of_ternary_weights_are_two():
    with pytest.raises(InputError, match="TQ2_0 or TQ1_0"):
        Gguf(ternary="TQ3_0")


FAMILIES = {
    "llama, more heads than width": lambda: tiny_llama(head_dim=32, attention_bias=True, mlp_bias=True),
    "llama, untied": lambda: tiny_llama(tie_word_embeddings=False),
    "llama 3": lambda: tiny_llama(rope_parameters=LLAMA_3),
    "llama, linear": lambda: tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "gpt2": tiny_gpt2,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)),
}


@pytest.mark.parametrize("scheme", [{}, {"head": True, "embedding": True}], ids=["plain", "head and embedding"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_architectures(name, scheme, target, tmp_path):
    """With config.json beside the file, and, as far as a file says enough, without it."""
    model = quantized(FAMILIES[name](), **scheme)
    read = target.read(target.write(model, tmp_path / "one"))
    assert same_codes(model, read)
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))
    (tmp_path / "one" / "config.json").unlink()
    if name == "llama 3":
        with pytest.raises(InputError, match=r"rope_freqs.*config\.json"):
            target.read(tmp_path / "one")
    else:
        assert torch.equal(logits(target.read(tmp_path / "one"), token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_alone_is_enough(name, target, tmp_path):
    model = converted(name, WEIGHTS["Q4_0"], torch.bfloat16)
    shutil.move(target.write(model, tmp_path / "gguf") / FILE, tmp_path / "renamed.gguf")
    for place in (tmp_path / "renamed.gguf", tmp_path):
        read = target.read(place)
        assert read.dtype == torch.bfloat16
        assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))


def test_a_tied_head_and_its_embedding_are_one_tensor(target, tmp_path):
    folder = target.write(quantized(tiny_llama(), embedding=True), tmp_path / "gguf")
    types = types_in(folder)
    assert types["token_embd.weight"] == "Q4_0"
    assert "output.weight" not in types
    read = target.read(folder)
    assert read.lm_head.weight is read.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_transformers_loads_the_same_weights(name, target, tmp_path):
    """Its loader dequantizes: every weight equals ours to the bit, and the logits are those of these weights."""
    sizes = SIZES | {"intermediate_size": 128}
    plain = {
        "llama": lambda: tiny_llama(),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        # transformers takes these two for GPT-2's own where it reads GGUF, whatever the file says.
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_positions=1024, vocab_size=50257, n_embd=32, n_layer=2, n_head=2)),
    }[name]()
    other, left_out = ("*.mlp.c_proj", "*.0.mlp.c_fc") if name == "gpt2" else ("*.down_proj", "*.0.self_attn.q_proj")
    rules = {"other": qat.Rule(other, weight=WEIGHTS["MXFP4"])}
    model = quantized(plain, rules=rules, exclude=[left_out])
    folder = target.write(model, tmp_path / "gguf")
    shutil.copy(folder / FILE, tmp_path / FILE)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    layers = packed_layers(model)
    assert len(layers) == (7 if name == "gpt2" else 13)
    for path, layer in layers.items():
        theirs = loaded.get_submodule(path).weight
        assert torch.equal(layer.weight.dequantize(), theirs.t() if name == "gpt2" else theirs), path
    for path, parameter in model.named_parameters():
        theirs = loaded.get_parameter(path)
        assert torch.equal(parameter, theirs.t() if "c_fc.weight" in path else theirs), path
    assert torch.equal(logits(loaded, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama, tied", "qwen, with biases", *FAMILIES])
def test_the_consumer_computes_the_same(name, dtype, target, tmp_path):
    """transformers, told of the config.json beside the file, since it makes less of the metadata than llama.cpp."""
    model = (MODELS | FAMILIES)[name]()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = quantized(model)
    folder = target.write(model, tmp_path / "gguf")
    if name == "mistral":
        with pytest.raises(NotInstalled, match="make test-engines"):
            target.consumer(folder)
    else:
        assert torch.equal(target.consumer(folder).logits(token_ids()), logits(model, token_ids()))


def test_any_loader_of_the_project_opens_it(folder):
    for place in (folder, folder / FILE):
        assert isinstance(qat.load(place).lm_head, torch.nn.Linear)
        assert isinstance(qat.load(place).get_submodule(LAYER), PackedLinear)


def test_the_order_of_rotated_rows_is_that_of_llama_cpp(target, tmp_path):
    """llama.cpp rotates neighbours, transformers the halves of a head."""
    model = quantized(tiny_llama())
    reader = gguf.GGUFReader(target.write(model, tmp_path / "gguf") / FILE)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    attention = model.model.layers[0].self_attn
    for name, layer, heads in (("attn_q", attention.q_proj, 4), ("attn_k", attention.k_proj, 2)):
        found = torch.from_numpy(gguf.dequantize(tensors[f"blk.0.{name}.weight"].data, gguf.GGMLQuantizationType.Q4_0))
        ours = layer.weight.dequantize().view(heads, 2, -1, 64)
        assert torch.equal(found.view(heads, -1, 2, 64)[:, :, 0], ours[:, 0])
        assert torch.equal(found.view(heads, -1, 2, 64)[:, :, 1], ours[:, 1])


def test_what_the_loader_of_llama_cpp_asks_for(tmp_path):
    """Keys with their types, tensors one after the other at multiples of 32 bytes, vectors in float32."""
    folder = Gguf(name="tiny").write(converted("llama, tied", WEIGHTS["Q4_0"], torch.float16), tmp_path / "gguf")
    reader = gguf.GGUFReader(folder / FILE)
    said = {key: (field.contents(), field.types[0].name) for key, field in reader.fields.items() if "." in key}
    assert said["general.architecture"] == ("llama", "STRING")
    assert said["general.name"] == ("tiny", "STRING")
    assert said["general.file_type"] == (gguf.LlamaFileType.MOSTLY_Q4_0, "UINT32")
    assert said["general.quantization_version"] == (2, "UINT32")
    expected = {
        "context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128, "vocab_size": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16,
    }  # fmt: skip
    for key, value in expected.items():
        assert said[f"llama.{key}"] == (value, "UINT32")
    assert said["llama.rope.freq_base"] == (10000.0, "FLOAT32")
    assert said["llama.attention.layer_norm_rms_epsilon"] == (np.float32(1e-6), "FLOAT32")
    end = reader.data_offset
    for tensor in reader.tensors:
        assert tensor.data_offset == end
        assert end % 32 == 0
        end += -(-tensor.n_bytes // 32) * 32
        assert len(tensor.shape) > 1 or tensor.tensor_type.name == "F32"
    assert end == (folder / FILE).stat().st_size
    assert types_in(folder)["token_embd.weight"] == "F16"
    assert reader.tensors[0].shape.tolist() == [64, 96]  # the dimension that lies contiguous comes first


def foreign(path, kind, tie=True):
    """A file of a tiny Llama as others quantize one: all matrices by the package's own rounding; and its values."""
    torch.manual_seed(0)
    model = tiny_llama(tie_word_embeddings=tie).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 2), ("context_length", 64), ("embedding_length", 64), ("vocab_size", 96)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    values = {}
    for name, parameter in model.named_parameters():
        data, type_ = parameter.detach().numpy(), gguf.GGMLQuantizationType.F32
        if data.ndim > 1:
            type_ = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quantize(data, type_)
            data = values[name] = gguf.dequantize(blocks, type_)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            data = data.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(data.shape)
        module, _, leaf = name.rpartition(".")
        # Once more on values that lie on the grid already: the same scales and codes, in the rows' new order.
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", gguf.quantize(data, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
def test_files_of_others_open_packed(kind, target, tmp_path):
    """Embeddings included; scales may be negative there, and Q4_1 and Q5_1 have offsets."""
    values = foreign(tmp_path / "their.gguf", kind)
    read = target.read(tmp_path / "their.gguf")
    layers = packed_layers(read)
    assert (len(layers) == 2 * 7 + 2) == (kind in BLOCK_TYPES)
    for path, value in values.items():
        module = read.get_submodule(path.removesuffix(".weight"))
        found = module.weight.dequantize() if path.removesuffix(".weight") in layers else module.weight
        assert torch.equal(found, torch.from_numpy(value).to(found.dtype)), path
    plain = tiny_llama().eval()
    plain.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, strict=False)
    half = kind in ("F16", "BF16")
    if not half:
        torch.testing.assert_close(logits(read, token_ids()), logits(plain, token_ids()), rtol=0, atol=1e-5)
    if kind not in BLOCK_TYPES:
        with pytest.raises(InputError, match="the scheme has none"):
            target.write(read, tmp_path / "ours")
        return
    assert any((layer.weight.scale < 0).any() for layer in layers.values()) == (kind in ("Q4_0", "Q5_0"))
    target.write(read, tmp_path / "ours")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "ours" / FILE).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "their.gguf").tensors:
        np.testing.assert_array_equal(tensors[tensor.name], tensor.data)
    assert torch.equal(logits(target.read(tmp_path / "ours"), token_ids()), logits(read, token_ids()))


REFUSED = {
    "bits": (partial(LSQQuantizer, bits=3, **HALF), {}, "3 bits.*holds: scheme.weight.bits=4$"),
    "more bits": (partial(LSQQuantizer, bits=7, **HALF), {}, "7 bits.*scheme.weight.bits=8$"),
    "scales": (partial(LSQQuantizer, granularity="per_group_32"), {}, "not float16.*scale_dtype=float16$"),
    "groups": (partial(LSQQuantizer, granularity="per_group_64", scale_dtype="float16"), {}, "=per_group_32$"),
    "channels": (partial(LSQQuantizer, granularity="per_channel", scale_dtype="float16"), {}, "=per_group_32$"),
    "zero points": (partial(LSQQuantizer, symmetric=False, **HALF), {}, "zero points.*weight=lsq .*bits=4$"),
    "nf4": (partial(TableQuantizer, **HALF), {}, "codebook16 codes.*weight=lsq scheme.weight.bits=4$"),
    "codebook": (partial(KMeansQuantizer, bits=4, **HALF), {}, "codebook16 codes.*weight=lsq"),
    "double": (partial(TableQuantizer, double_quant=True), {}, "codebook16 codes.*float16"),
    "fp8": (partial(MinMaxQuantizer, bits=8, granularity="per_tensor"), {}, "per_tensor.*per_group_32"),
    "mxfp6": (partial(MicroscalingQuantizer, format="fp6_e2m3"), {}, "fp6_e2m3 codes.*weight=lsq scheme.weight.bits=5"),
    "nvfp4": (partial(NVFP4Quantizer), {}, "quantized themselves.*weight=mxfp4 .*=per_group_32$"),
    "ternary groups": (partial(LSQQuantizer, bits=2, grid="ternary", **HALF), {}, "64 columns.*bits=4"),
    "learned ternary": (partial(KMeansQuantizer, bits=2, entries=3, **HALF), {}, "codebook3 codes.*bits=4"),
    "binary": (partial(TableQuantizer, family="binary", bits=1, **HALF), {}, "codebook2 codes.*bits=4"),
    "input": (WEIGHTS["Q4_0"], {"input": TOKEN}, "quantized input.*input=none"),
    "output": (WEIGHTS["Q4_0"], {"output": TOKEN}, "quantized output.*output=none"),
    "kv": (WEIGHTS["Q4_0"], {"kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
    "nothing": (None, {}, "scheme=w4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_refused_before_training(case, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    weight, options, message = REFUSED[case]
    with torch.device("meta"):
        model = MODELS["llama, tied"]()
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


@pytest.mark.parametrize("weight", [*WEIGHTS.values(), *TERNARY.values()], ids=[*WEIGHTS, *TERNARY])
def test_what_it_can_hold_is_not_refused(weight, target):
    with torch.device("meta"):
        model = tiny_llama(**WIDE_SIZES)
    target.check(qat.prepare(model, qat.Scheme(weight=weight), initialize=False))


def test_columns_that_fill_no_block_are_refused(target):
    rules = {"down": qat.Rule("*.down_proj", weight=partial(LSQQuantizer, bits=4, granularity="per_group_16"))}
    model = quantized(tiny_llama(intermediate_size=80), rules=rules)
    with pytest.raises(InputError, match=r"80 columns, which do not fill blocks of 32.*scheme\.exclude"):
        target.write(model, "unused")


ARCHITECTURES = {
    "experts": (tiny_mixtral, "is a model of the type mixtral"),
    "activation": (lambda: tiny_llama(hidden_act="gelu"), "hidden_act=silu.*gelu"),
    "window": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)), "sliding_window=None"),
    "rotation": (
        lambda: tiny_llama(
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
            }
        ),
        "not yarn",
    ),
    "attention": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=2, scale_attn_weights=False)
        ),
        "scale_attn_weights=True",
    ),
    "no language model": (lambda: torch.nn.Sequential(torch.nn.Linear(64, 64)), "of the type None"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_llama_cpp_computes_otherwise_is_refused(name, target):
    make, message = ARCHITECTURES[name]
    with pytest.raises(InputError, match=message):
        target.check(qat.prepare(make(), qat.Scheme(weight=WEIGHTS["Q4_0"])))


def test_other_files_are_not_replaced(target, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="other files"):
        target.write(converted("llama, tied", WEIGHTS["Q4_0"]), tmp_path)


@pytest.fixture
def folder(target, tmp_path):
    return target.write(converted("llama, tied", WEIGHTS["Q4_0"]), tmp_path / "gguf")


@pytest.mark.parametrize("share", [0, 0.0002, 0.02, 0.05, 0.5, 0.99])
def test_a_file_that_ends_too_early(share, folder, target):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"no GGUF file|ends within its header|ends before its tensor"):
        target.read(folder)


def test_every_damaged_byte_of_the_header_is_survived(folder, target):
    """It may go unnoticed, in a name of a key say; but nothing else than an InputError comes of it, and at once."""
    whole = bytearray((folder / FILE).read_bytes())
    for place in range(4, 700, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0xA5
        (folder / FILE).write_bytes(damaged)
        try:
            GgufFile(folder / FILE)
        except InputError:
            continue


def test_a_damaged_file_alone_is_survived_too(folder, target):
    """Its sizes are believed only as far as the tensors have them, before a model is built of them."""
    (folder / "config.json").unlink()
    whole = bytearray((folder / FILE).read_bytes())
    for place in range(whole.index(b"llama.context"), whole.index(b"tokenizer.ggml"), 29):
        for bits in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= bits
            (folder / FILE).write_bytes(damaged)
            try:
                target.read(folder)
            except InputError:
                continue


HEADS = b"attention.head_count\x04\0\0\0"
NAME = b"\x05\0\0\0\0\0\0\0"
DAMAGES = {
    "version": (lambda data: data[:4] + b"\x09" + data[5:], "version 9"),
    "another format": (lambda data: b"PK\x03\x04" + data[4:], "no GGUF file"),
    "heads": (lambda data: swap(data, HEADS + b"\x04", HEADS + b"\x02"), "head_count is 2.*says 4"),
    "architecture": (lambda data: swap(data, NAME + b"llama", NAME + b"qwen3"), "is a qwen3"),
    "unknown": (lambda data: swap(data, NAME + b"llama", NAME + b"bloom"), "architecture bloom"),
    "name": (lambda data: swap(data, b"blk.0.ffn_up.weight", b"blk.0.ffn_ip.weight"), "no tensor blk.0.ffn_up.weight"),
}


def swap(data, one, other):
    assert one in data
    return data.replace(one, other, 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_says_something_else(damage, folder, target):
    change, message = DAMAGES[damage]
    (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))
    with pytest.raises(InputError, match=message):
        target.read(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_attention_heads": 2, "head_dim": 32}, "attention.head_count is 4.*says 2"),
        ({"intermediate_size": 96}, "feed_forward_length is 128.*says 96"),
        ({"tie_word_embeddings": False}, "no tensor output.weight"),
        ({"num_hidden_layers": 1}, "block_count is 2"),
        ({"attention_bias": True}, "no tensor blk.0.attn_q.bias"),
        ({"rope_parameters": LLAMA_3 | {"rope_theta": 1e4}}, "rotary positions otherwise"),
        ({"rms_norm_eps": 1e-5}, "rms_epsilon"),
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_file(options, message, folder, target):
    """Heads above all: with another number of them the shapes fit, and rows are mixed up."""
    tiny_llama(**options).config.save_pretrained(folder)
    with pytest.raises(InputError, match=message):
        target.read(folder)


def test_tensors_that_the_model_does_not_have(folder, target, tmp_path):
    biased = target.write(quantized(tiny_llama(attention_bias=True)), tmp_path / "biased")
    shutil.copy(biased / FILE, folder / FILE)
    with pytest.raises(InputError, match="holds 8 tensors that its model has no place for"):
        target.read(folder)


@pytest.mark.parametrize("kind", ["Q6_K", "IQ2_XXS"])
def test_blocks_that_are_no_grid_of_ours(kind, target, tmp_path):
    foreign(tmp_path / "their.gguf", "Q8_0")
    data = (tmp_path / "their.gguf").read_bytes()
    name = b"token_embd.weight"
    head, tail = data[: data.index(name)], data[data.index(name) + len(name) + 4 + 2 * 8 + 4 :]
    # As wide as a block of 256.
    described = struct.pack("<IQQI", 2, 256, 96, gguf.GGMLQuantizationType[kind])
    (tmp_path / "their.gguf").write_bytes(head + name + described + tail)
    with pytest.raises(InputError, match=f"token_embd.weight is {kind}.*Q4_0"):
        target.read(tmp_path / "their.gguf")


def test_a_folder_of_several_files(target, tmp_path):
    for name in ("one.gguf", "two.gguf"):
        foreign(tmp_path / name, "Q4_0")
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        target.read(tmp_path)
    with pytest.raises(InputError, match="There is no file"):
        target.read(tmp_path / "three.gguf")
