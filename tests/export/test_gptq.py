"""GPTQ checkpoints: the stored numbers against the published layout, and back. Engines are in `test-engines`."""

from functools import partial

import pytest
import torch

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.layouts.gptq import Gptq
from qat.export.tensor_files import TensorFiles
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, TableQuantizer
from tests.conftest import tiny_llama
from tests.export.exported import MODELS, converted, logits, quantization, same_codes, same_files, token_ids

WEIGHTS = {
    "int4": partial(LSQQuantizer, bits=4, granularity="per_group_32"),
    "int3": partial(MinMaxQuantizer, bits=3, granularity="per_channel"),
    "int2": partial(MinMaxQuantizer, bits=2, granularity="per_flat_group_32", scale_dtype="float16"),
    "uint4": partial(LSQQuantizer, bits=4, granularity="per_group_32", symmetric=False),
    "uint8": partial(MinMaxQuantizer, bits=8, granularity="per_channel", symmetric=False),
}
TOKEN = partial(MinMaxQuantizer, granularity="per_token")
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def target():
    return Checkpoint(Gptq())


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name, weight, target, tmp_path):
    """The same codes and scales, the same logits, and written again the same bytes."""
    model = converted(name, WEIGHTS[weight], torch.bfloat16)
    read = target.read(target.write(model, tmp_path / "one"))
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert weight == "int2" or same_codes(model, read)  # flat groups of whole rows come back as groups of rows
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


@pytest.mark.parametrize("weight", ["int4", "int3", "uint4", "uint8"])
def test_the_words_are_those_of_the_format(weight, target, tmp_path):
    """Decoded one code at a time, as the format is described."""
    model = converted("llama, tied", WEIGHTS[weight])
    files = TensorFiles(target.write(model, tmp_path / "gptq"))
    q = model.get_submodule(LAYER).weight.quantized()
    bits, (rows, columns) = q.format.bits, q.shape
    qweight, qzeros, scales, g_idx = (files[f"{LAYER}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx"))
    assert qweight.shape == (columns * bits // 32, rows)
    assert scales.dtype == torch.bfloat16
    first_version = quantization(tmp_path / "gptq")["checkpoint_format"] == "gptq"

    def code(words, i):
        stream = sum(int(word) % 2**32 << 32 * place for place, word in enumerate(words))
        return stream >> bits * i & 2**bits - 1

    for row in range(0, rows, 7):
        for column in range(0, columns, 5):
            zero = code(qzeros[g_idx[column]], row) + first_version
            value = (code(qweight[:, row], column) - zero) * scales[g_idx[column], row].float()
            assert value == q.dequantize()[row, column]


def test_zero_points_of_zero_take_the_second_version(target, tmp_path):
    """The first version stores them minus one, and engines disagree on what minus one is."""
    model = converted("llama, tied", WEIGHTS["uint4"])
    model.get_submodule(LAYER).weight.zero_point.fill_(3)
    for layer in model.modules():
        if isinstance(layer, qat.nn.PackedLinear):
            layer.weight.zero_point.clamp_(min=1)
    assert quantization(target.write(model, tmp_path / "one"))["checkpoint_format"] == "gptq"
    model.get_submodule(LAYER).weight.zero_point[0, 0] = 0
    assert quantization(target.write(model, tmp_path / "two"))["checkpoint_format"] == "gptq_v2"
    assert same_codes(model, target.read(tmp_path / "two"))


def test_layers_of_other_bits_and_without_any(target, tmp_path):
    rules = {"down": qat.Rule("*.down_proj", weight=partial(LSQQuantizer, bits=8, granularity="per_group_32"))}
    model = converted("llama, tied", WEIGHTS["int4"], rules=rules, exclude=["*.0.mlp.up_proj"])
    read = target.read(target.write(model, tmp_path / "gptq"))
    dynamic = quantization(tmp_path / "gptq")["dynamic"]
    assert dynamic["-:^model\\.layers\\.0\\.mlp\\.up_proj$"] == {}
    assert dynamic["+:^model\\.layers\\.1\\.mlp\\.down_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert same_codes(model, read)
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))


def test_a_quantized_head_is_said(target, tmp_path):
    torch.manual_seed(0)
    model = qat.convert(
        qat.prepare(tiny_llama(tie_word_embeddings=False).eval(), qat.Scheme(weight=WEIGHTS["int4"], head=True))
    )
    read = target.read(target.write(model, tmp_path / "gptq"))
    assert quantization(tmp_path / "gptq")["lm_head"] is True
    assert same_codes(model, read)


@pytest.mark.parametrize("weight", ["int4", "uint4"])
def test_who_wrote_zero_points_is_said(weight, target, tmp_path):
    """GPTQModel takes asymmetric checkpoints of the first version from no older tool."""
    said = quantization(target.write(converted("llama, tied", WEIGHTS[weight]), tmp_path / "gptq"))
    assert said.get("meta") == ({"quantizer": ["gptqmodel:0.9.0"]} if weight == "uint4" else None)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (partial(TableQuantizer, bits=4), {}, "codebook16 codes.*quantizer@scheme.weight=lsq"),
        (partial(LSQQuantizer, bits=5), {}, "5 bits.*scheme.weight.bits=4"),
        (partial(LSQQuantizer, granularity="per_group_16"), {}, "per_group_16.*granularity=per_group_32"),
        (partial(LSQQuantizer, granularity="per_tensor"), {}, "per_tensor.*granularity=per_channel"),
        (partial(LSQQuantizer, scale_dtype="float32"), {}, "16-bit floats.*scale_dtype=bfloat16"),
        (WEIGHTS["int4"], {"input": TOKEN}, "input=none"),
        (WEIGHTS["int4"], {"embedding": True}, "embedding layer.*scheme.embedding=false"),
        (WEIGHTS["int4"], {"kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
    ],
    ids=["codebook", "bits", "groups", "tensor", "scales", "input", "embedding", "kv"],
)
def test_what_it_cannot_hold_is_refused_before_training(weight, options, message, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    with torch.device("meta"):
        model = MODELS["llama, tied"]()
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


def test_several_reasons_are_told_at_once(target):
    weight = partial(LSQQuantizer, bits=6, granularity="per_tensor")
    with pytest.raises(InputError) as refused:
        target.check(qat.prepare(MODELS["llama, tied"](), qat.Scheme(weight=weight)))
    assert str(refused.value) == (
        "GPTQ cannot hold model.layers.0.self_attn.q_proj, which has 6 bits, scales per_tensor. The nearest that it "
        "holds: scheme.weight.bits=8 scheme.weight.granularity=per_channel"
    )


def test_reordered_columns_are_refused(target, tmp_path):
    """As checkpoints of other tools may have them."""
    from safetensors.torch import load_file, save_file

    folder = target.write(converted("llama, tied", WEIGHTS["int4"]), tmp_path / "gptq")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match="desc_act=false"):
        target.read(folder)
