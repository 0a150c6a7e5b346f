"""AWQ checkpoints: the stored numbers against the published layout, and back. Engines are in `test-engines`."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.layouts.awq import Awq
from qat.export.tensor_files import TensorFiles
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, TableQuantizer
from tests.export.exported import MODELS, converted, logits, quantization, same_codes, same_files, token_ids

WEIGHTS = {
    "symmetric": partial(LSQQuantizer, bits=4, granularity="per_group_32"),
    "asymmetric": partial(LSQQuantizer, bits=4, granularity="per_group_32", symmetric=False),
    "rows": partial(MinMaxQuantizer, bits=4, granularity="per_channel", symmetric=False),
    "float16 scales": partial(MinMaxQuantizer, bits=4, granularity="per_flat_group_32", scale_dtype="float16"),
}
TOKEN = partial(MinMaxQuantizer, granularity="per_token")
LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def target():
    return Checkpoint(Awq())


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name, weight, target, tmp_path):
    """The same codes and scales, the same logits, and written again the same bytes."""
    model = converted(name, WEIGHTS[weight], torch.bfloat16)
    read = target.read(target.write(model, tmp_path / "one"))
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    assert weight == "float16 scales" or same_codes(model, read)  # flat groups come back as groups of rows
    assert same_files(tmp_path / "one", target.write(read, tmp_path / "two"))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_words_are_those_of_the_format(weight, target, tmp_path):
    """Decoded one code at a time: the nibbles of a word hold its outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    model = converted("llama, tied", WEIGHTS[weight])
    files = TensorFiles(target.write(model, tmp_path / "awq"))
    q = model.get_submodule(LAYER).weight.quantized()
    rows, columns = q.shape
    qweight, qzeros, scales = (files[f"{LAYER}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
    groups = 1 if weight == "rows" else columns // 32
    assert (qweight.dtype, qweight.shape) == (torch.int32, (columns, rows // 8))
    assert (qzeros.dtype, qzeros.shape) == (torch.int32, (groups, rows // 8))
    assert (scales.dtype, scales.shape) == (q.qparams.scale.dtype, (groups, rows))
    nibble_of_output = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}

    def code(words, output):
        return int(words[output // 8]) % 2**32 >> 4 * nibble_of_output[output % 8] & 15

    for row in range(0, rows, 3):
        for column in range(0, columns, 7):
            group = column * groups // columns
            value = (code(qweight[column], row) - code(qzeros[group], row)) * scales[group, row].float()
            assert value == q.dequantize()[row, column]


def test_what_config_json_says(target, tmp_path):
    """All that engines ask for; transformers takes it too, though it needs GPTQModel for the layers."""
    model = converted("qwen, with biases", WEIGHTS["rows"], exclude=["*.0.mlp.up_proj"])
    folder = target.write(model, tmp_path / "awq")
    assert quantization(folder) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["model.layers.0.mlp.up_proj", "lm_head"],
    }
    understood = AutoQuantizationConfig.from_dict(AutoConfig.from_pretrained(folder).quantization_config)
    assert (understood.format, understood.bits, understood.group_size) == ("gemm", 4, -1)
    read = target.read(folder)
    assert type(read.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))


def test_a_head_of_its_own_may_be_quantized(target, tmp_path):
    model = converted("qwen, with biases", WEIGHTS["symmetric"], head=True)
    read = target.read(target.write(model, tmp_path / "awq"))
    assert quantization(tmp_path / "awq")["lm_head"] is True
    assert same_codes(model, read)


def test_symmetric_and_asymmetric_layers_in_one_checkpoint(target, tmp_path):
    rules = {"down": qat.Rule("*.down_proj", weight=WEIGHTS["asymmetric"])}
    model = converted("llama, tied", WEIGHTS["symmetric"], rules=rules)
    assert same_codes(model, target.read(target.write(model, tmp_path / "awq")))


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (partial(TableQuantizer, bits=4), {}, "codebook16 codes.*quantizer@scheme.weight=lsq"),
        (partial(LSQQuantizer, bits=8), {}, "8 bits.*scheme.weight.bits=4"),
        (partial(LSQQuantizer, granularity="per_group_16"), {}, "per_group_16.*granularity=per_group_32"),
        (partial(LSQQuantizer, granularity="per_block_8x8"), {}, "per_block_8x8.*granularity=per_channel"),
        (partial(LSQQuantizer, scale_dtype="float32"), {}, "16-bit floats.*scale_dtype=bfloat16"),
        (WEIGHTS["symmetric"], {"input": TOKEN}, "input=none"),
        (WEIGHTS["symmetric"], {"embedding": True}, "embedding layer.*scheme.embedding=false"),
        (WEIGHTS["symmetric"], {"kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
        (
            WEIGHTS["symmetric"],
            {"rules": {"down": qat.Rule("*.down_proj", weight=partial(LSQQuantizer, granularity="per_channel"))}},
            "this model.*several sizes: 32, whole rows.*~scheme.rules",
        ),
    ],
    ids=["codebook", "bits", "groups", "blocks", "scales", "input", "embedding", "kv", "several sizes"],
)
def test_what_it_cannot_hold_is_refused_before_training(weight, options, message, target):
    """On the meta device, as the pipeline asks before anything is computed."""
    with torch.device("meta"):
        model = MODELS["llama, tied"]()
    qat.prepare(model, qat.Scheme(weight=weight, **options), initialize=False)
    with pytest.raises(InputError, match=message):
        target.check(model)


def test_outputs_that_fill_no_words_are_refused(target):
    model = nn.Sequential(nn.Linear(32, 12))
    qat.prepare(model, qat.Scheme(weight=WEIGHTS["symmetric"]), initialize=False)
    with pytest.raises(InputError, match=r"12 outputs.*scheme.exclude"):
        target.check(model)


def test_a_name_within_that_of_another_layer_is_refused(target):
    """As a router has it beside gated layers: engines would leave both in full precision."""
    model = nn.ModuleDict({"gate": nn.Linear(32, 32), "gate_proj": nn.Linear(32, 32)})
    qat.prepare(model, qat.Scheme(weight=WEIGHTS["symmetric"], exclude=["gate"]), initialize=False)
    with pytest.raises(InputError, match=r"gate in full precision.*for gate_proj too.*export=gptq"):
        target.check(model)


def damaged_tensor(folder, leaf, change):
    """Replace the tensor `leaf` of `LAYER` by what `change` makes of it; None leaves it out."""
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.{leaf}"] = change(tensors[f"{LAYER}.{leaf}"])
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("qzeros", lambda _: None, "down_proj has no tensor qzeros"),
        ("qweight", lambda _: None, "lacks 1 of the model's tensors.*down_proj.weight"),
        ("qweight", torch.Tensor.float, "qweight is torch.float32, not torch.int32"),
        ("qweight", lambda t: t[:48].contiguous(), "48 columns, which groups of 32 do not divide"),
        ("qweight", lambda t: t[:, :-1].contiguous(), r"scales is \[4, 64\].*\[4, 56\]"),
        ("scales", lambda t: t[:1].contiguous(), r"scales is \[1, 64\].*\[4, 64\]"),
        ("qzeros", torch.Tensor.flatten, r"qzeros is \[32\].*\[4, 8\]"),
    ],
    ids=["no zeros", "no codes", "floats", "columns", "outputs", "scales", "zeros"],
)
def test_damaged_tensors_are_refused(leaf, change, message, target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHTS["asymmetric"]), tmp_path / "awq")
    damaged_tensor(folder, leaf, change)
    with pytest.raises(InputError, match=message):
        target.read(folder)


def test_a_file_that_was_cut_is_refused(target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHTS["symmetric"]), tmp_path / "awq")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        target.read(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 8}, "bits=8; only 4"),
        ({"version": "gemv"}, "version=gemv; only gemm"),
        ({"group_size": 64}, r"scales is \[4, 64\].*\[2, 64\]"),
        ({"group_size": None}, "group_size=None; only int"),
        ({"quant_method": "gptq"}, "is no AWQ checkpoint: the quant_method of its config.json is gptq"),
    ],
    ids=["bits", "version", "groups", "no groups", "method"],
)
def test_a_config_that_says_something_else_is_refused(said, message, target, tmp_path):
    folder = target.write(converted("llama, tied", WEIGHTS["symmetric"]), tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        target.read(folder)
