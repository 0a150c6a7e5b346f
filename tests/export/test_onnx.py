"""ONNX with QDQ: ONNX Runtime computes what we do, and what is written is read back to the bit."""

import json
import shutil
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import qat
from qat.errors import InputError
from qat.nn import PackedLinear, PackedTensor, StoredActivation
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MicroscalingQuantizer, MinMaxQuantizer, TableQuantizer
from tests.conftest import tiny_llama
from tests.export.exported import logits, same_codes, same_files, token_ids
from tests.models import SIZES

onnx = pytest.importorskip("onnx", reason="onnx writes these files")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime computes what the files say")
pytest.importorskip("onnxscript", reason="torch exports by onnxscript")
ir = pytest.importorskip("onnx_ir", reason="onnxscript brings it")

from qat.export.onnx.activations import DynamicActivation, static_nodes  # noqa: E402
from qat.export.onnx.graph import simplify  # noqa: E402
from qat.export.onnx.target import Onnx  # noqa: E402
from qat.export.onnx.weights import read_weight, weight_nodes  # noqa: E402

INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
INT8 = partial(LSQQuantizer, bits=8, granularity="per_channel")
FP8 = partial(MinMaxQuantizer, bits=8, format="fp8_e4m3", granularity="per_channel", scale_dtype="float32")
TOKEN = partial(MinMaxQuantizer, bits=8, granularity="per_token", scale_dtype="float32")
STATIC = partial(MinMaxQuantizer, bits=8, granularity="per_tensor", dynamic=False, scale_dtype="float32")
# Of one layer mostly, since torch takes seconds for each.
MODELS = {
    "llama": lambda: tiny_llama(),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES | {"num_hidden_layers": 1})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=1, n_head=4)),
}
CASES = {
    "llama int4": ("llama", {"weight": INT4}, 21),
    "qwen uint4": ("qwen", {"weight": partial(INT4, symmetric=False)}, 21),
    "gpt2 ternary": ("gpt2", {"weight": partial(INT4, bits=2, grid="ternary"), "exclude": ["*.c_fc"]}, 25),
    "qwen w8a8": ("qwen", {"weight": INT8, "input": TOKEN}, 21),
    "gpt2 w8a8 static": ("gpt2", {"weight": INT8, "input": partial(STATIC, symmetric=False), "output": STATIC}, 21),
    "gpt2 fp8": ("gpt2", {"weight": FP8, "input": partial(STATIC, format="fp8_e4m3")}, 21),
}
# Of logits, relative to the largest: float32 sums in another order. Outputs that are quantized may round to the code
# beside by it, as one of this model does.
TOLERANCE = 2e-6
ROUNDED_OUTPUTS = {"gpt2 w8a8 static": 5e-3}


def converted(name, weight, dtype=torch.float32, **scheme):
    torch.manual_seed(0)
    model = MODELS[name]().eval().to(dtype)
    for vector in (p for p in model.parameters() if p.ndim == 1):
        nn.init.normal_(
            vector, mean=float(vector.detach().mean()), std=0.1
        )  # biases of zero and norms of one hide errors
    model = qat.prepare(model, qat.Scheme(weight=weight, **scheme))
    return qat.convert(qat.calibrate(model, [{"input_ids": token_ids(4)}]))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A case's model and the folder that it was written to, once for all tests."""

    @cache
    def write(case):
        name, scheme, opset = CASES[case]
        model = converted(name, **scheme)
        return model, Onnx(opset).write(model, tmp_path_factory.mktemp("onnx") / "model")

    return write


@pytest.fixture
def copied(written, tmp_path):
    """A folder to damage."""
    return shutil.copytree(written("llama int4")[1], tmp_path / "copy")


def session(model, exact=True):
    """ONNX Runtime on the CPU; `exact` keeps activations beside integers of 4 bits in float32."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_logits(folder, ids, mask, **options):
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    return torch.from_numpy(session(folder / "model.onnx", **options).run(None, feeds)[0])


def graph_of(nodes, inputs=(), opset=21):
    """A model of these nodes, whose last one gives the result, as bytes."""
    constants = {v.name: v for node in nodes for v in node.inputs if v.const_value is not None}
    outputs = nodes[-1].outputs
    for output in outputs:
        output.name, output.type = "y", inputs[0].type if inputs else None
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=list(constants.values()), opset_imports={"": opset})
    return ir.to_proto(ir.Model(graph, ir_version=10))


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_computes_the_same_logits(case, written):
    """With other numbers of rows and tokens than were traced, one among them, and with padding."""
    model, folder = written(case)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    for rows, length in ((1, 1), (2, 8), (3, 21)):
        ids = token_ids(rows, length)
        mask = torch.ones_like(ids)
        mask[0, length - length // 4 :] = 0
        with torch.inference_mode():
            ours = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        theirs = onnx_logits(folder, ids, mask)[mask.bool()]
        assert (ours - theirs).abs().max() <= ROUNDED_OUTPUTS.get(case, TOLERANCE) * ours.abs().max()
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_back(case, written):
    model, folder = written(case)
    read = Onnx().read(folder)
    assert same_codes(model, read)
    assert torch.equal(logits(read, token_ids()), logits(model, token_ids()))
    ours, theirs = model.state_dict(), read.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", ["llama int4", "gpt2 w8a8 static"])
def test_it_is_written_again_to_the_byte(case, written, tmp_path):
    _, folder = written(case)
    again = Onnx(CASES[case][2]).write(Onnx().read(folder), tmp_path / "again")
    assert same_files(folder, again)


def test_every_weight_of_a_file_is_dequantized_to_ours(written):
    """By ONNX Runtime, from the file itself with its weights for outputs."""
    model, folder = written("llama int4")
    file = onnx.load(folder / "model.onnx")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    nodes = [node for node in file.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == len(layers)
    del file.graph.output[:]
    file.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in nodes)
    ids = token_ids(2, 8).numpy()
    found = session(file.SerializeToString()).run(None, {"input_ids": ids, "attention_mask": ids**0})
    for node, values in zip(nodes, found, strict=True):
        assert node.input[0].endswith(".weight.codes")
        ours = layers[node.input[0].removesuffix(".weight.codes")].weight.dequantize()
        assert torch.equal(torch.from_numpy(values).t(), ours)


def test_it_says_what_it_is(written):
    """Codes are of 4 bits, scales blocked along the input; names are those of the state dict, and nothing of ours."""
    model, folder = written("llama int4")
    file = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in file.opset_import] == [("", 21)]
    assert not any(node.metadata_props or node.doc_string for node in file.graph.node)
    types = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in file.graph.initializer}
    layer = "model.layers.1.mlp.down_proj.weight"
    assert types[f"{layer}.codes"] == (onnx.TensorProto.INT4, (128, 64))
    assert types[f"{layer}.scale"] == (onnx.TensorProto.FLOAT, (4, 64))
    assert {name for name in model.state_dict() if "norm" in name} <= set(types)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert (folder / "generation_config.json").is_file()
    codes = model.get_submodule(layer).quantized().codes
    data = (folder / "model.onnx.data").read_bytes()
    flat = codes.t().reshape(-1)
    assert bytes(((flat[::2] & 15) | (flat[1::2] & 15) << 4).to(torch.uint8).tolist()) in data


def test_a_block_that_is_called_again_is_stored_once_and_what_is_unused_is_kept(tmp_path):
    model = converted("gpt2", INT4, input=STATIC)
    model.transformer.h.append(model.transformer.h[0])
    model.config.num_hidden_layers = 2
    model.register_buffer("unused", torch.arange(3.0))
    folder = Onnx().write(model, tmp_path / "model")
    names = [tensor.name for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer]
    assert len([name for name in names if name.endswith("weight.codes")]) == 4
    assert "unused" in names
    ids = token_ids()
    ours, theirs = logits(model, ids), onnx_logits(folder, ids, torch.ones_like(ids))
    assert (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max()


def test_the_default_of_onnxruntime_rounds_activations_beside_4_bits(written):
    """Why the tests, and whoever wants what was trained, set accuracy level 1."""
    model, folder = written("llama int4")
    ids = token_ids()
    ours, mask = logits(model, ids), torch.ones_like(ids)
    error = (ours - onnx_logits(folder, ids, mask, exact=False)).abs().max() / ours.abs().max()
    assert TOLERANCE < error < 0.02


GRIDS = {
    "int4 groups": (INT4, 21, "INT4"),
    "uint4 groups": (partial(INT4, symmetric=False), 21, "UINT4"),
    "int3 tensor": (partial(MinMaxQuantizer, bits=3, granularity="per_tensor"), 21, "INT4"),
    "int6 channels": (partial(MinMaxQuantizer, bits=6, granularity="per_channel"), 21, "INT8"),
    "uint8 channels": (partial(MinMaxQuantizer, bits=8, granularity="per_channel", symmetric=False), 21, "UINT8"),
    "int2 groups of 8": (partial(MinMaxQuantizer, bits=2, granularity="per_group_8"), 25, "INT2"),
    "uint2 flat groups": (
        partial(MinMaxQuantizer, bits=2, granularity="per_flat_group_16", symmetric=False),
        25,
        "UINT2",
    ),
    "ternary, new opset": (partial(LSQQuantizer, bits=2, grid="ternary", granularity="per_group_16"), 25, "INT2"),
    "ternary, old opset": (partial(LSQQuantizer, bits=2, grid="ternary", granularity="per_tensor"), 21, "INT4"),
    "stretched": (partial(LSQQuantizer, bits=2, grid="stretched", granularity="per_channel"), 21, "INT4"),
    "stretched 3": (partial(LSQQuantizer, bits=3, grid="stretched", granularity="per_group_16"), 21, "INT4"),
    "fp8 channels": (FP8, 21, "FLOAT8E4M3FN"),
    "fp8 e5m2": (partial(FP8, format="fp8_e5m2", granularity="per_tensor"), 21, "FLOAT8E5M2"),
    "fp8 tiles": (partial(FP8, granularity="per_block_8x16"), 21, "FLOAT8E4M3FN"),
    "mxfp8": (partial(MicroscalingQuantizer, bits=8, format="fp8_e4m3", granularity="per_group_32"), 21, None),
}


def packed(quantizer, dtype, scale_dtype=None):
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)).to(dtype)
    options = {} if scale_dtype is None else {"scale_dtype": scale_dtype}
    made = quantizer(shape=weight.shape, **options)
    made.initialize(weight) if hasattr(made, "initialize") else None
    return PackedTensor.from_quantized(made.quantize(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_weight_is_dequantized_to_ours(grid, dtype):
    """By ONNX Runtime, which has no bfloat16 on a CPU: there by the reference of the standard."""
    quantizer, opset, stored = GRIDS[grid]
    weight = packed(quantizer, dtype)
    nodes = weight_nodes("w", weight, opset)
    tensors = {value.name: value.const_value for value in nodes[0].inputs}
    assert stored is None or tensors["w.codes"].dtype == ir.DataType[stored]
    read = read_weight("w", tensors.__getitem__, weight.description, opset)
    ours = weight.quantized()
    assert torch.equal(read.codes, ours.codes)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(read.qparams, ours.qparams, strict=True))
    model = graph_of(nodes, opset=opset)
    if dtype == torch.bfloat16:
        from onnx.reference import ReferenceEvaluator

        found = ReferenceEvaluator(model).run(None, {})[0]
    else:
        model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
        found = session(model.SerializeToString()).run(None, {})[0]
    assert torch.equal(torch.from_numpy(found.astype("float32")).t(), weight.dequantize(dtype).float())


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scales_of_every_type_stay_what_they_are(dtype, scale_dtype):
    """A type that is not the model's is multiplied in float32, and rounded once."""
    weight = packed(partial(MinMaxQuantizer, bits=8, granularity="per_group_32", symmetric=False), dtype, scale_dtype)
    nodes = weight_nodes("w", weight, 21)
    assert (len(nodes) == 1) == (dtype in (torch.float32, getattr(torch, scale_dtype)))
    model = graph_of(nodes)
    model.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    found = session(model.SerializeToString()).run(None, {})[0]
    assert torch.equal(torch.from_numpy(found).t(), weight.dequantize())
    tensors = {value.name: value.const_value for value in nodes[0].inputs}
    assert read_weight("w", tensors.__getitem__, weight.description, 21).qparams.scale.dtype == weight.scale.dtype


def activations(dtype=torch.float32):
    """Tokens of several sizes, the ties of a step of one half among them."""
    random = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 2, 5)[:, None, None]
    ties = torch.arange(-224, 224).view(1, 7, 64) / 4
    return torch.cat([random, ties, torch.zeros(1, 7, 64)]).to(dtype)


STATIC_GRIDS = {
    "int8": STATIC,
    "uint8": partial(STATIC, symmetric=False),
    "int4": partial(STATIC, bits=4),
    "uint4": partial(STATIC, bits=4, symmetric=False),
    "fp8": partial(STATIC, format="fp8_e4m3"),
    "fp8 e5m2": partial(STATIC, format="fp8_e5m2"),
}


@pytest.mark.parametrize("zero_point", [0, 3, 8])
@pytest.mark.parametrize("scale", [0.5, 0.037])
@pytest.mark.parametrize("grid", STATIC_GRIDS)
def test_static_activations_are_quantized_as_ours(grid, scale, zero_point):
    quantizer = STATIC_GRIDS[grid](shape=(64,))
    quantizer.initialized = True
    quantizer.scale.fill_(scale)
    if hasattr(quantizer, "zero_point"):
        quantizer.zero_point.fill_(zero_point)
    stored = StoredActivation.from_quantizer(quantizer)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["a", "b", 64]))
    model = graph_of(static_nodes("q", stored, x), [x])
    found = session(model.SerializeToString()).run(None, {"x": activations().numpy()})[0]
    assert torch.equal(torch.from_numpy(found), stored(activations()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "quantizer",
    [
        TOKEN,
        partial(TOKEN, symmetric=False, scale_dtype="bfloat16"),
        partial(TOKEN, bits=4, granularity="per_group_16", scale_dtype="float16"),
        partial(TOKEN, format="fp8_e4m3", granularity="per_tensor"),
    ],
    ids=["int8 tokens", "uint8 tokens", "int4 groups", "fp8 tensor"],
)
def test_dynamic_activations_are_quantized_as_ours(quantizer, dtype, tmp_path):
    stored = StoredActivation.from_quantizer(quantizer(shape=(64,)))
    x = activations(dtype)
    sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    options = {"dynamo": True, "optimize": False, "verbose": False, "opset_version": 21}
    program = torch.onnx.export(DynamicActivation(stored).eval(), (x[:2],), dynamic_shapes=[sizes], **options)
    simplify(program.model)
    program.save(tmp_path / "x.onnx")
    found = session(tmp_path / "x.onnx").run(None, {"x": x.numpy()})[0]
    assert torch.equal(torch.from_numpy(found), stored(x))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"weight": partial(TableQuantizer, bits=4)}, "codebook16 codes.*quantizer@scheme.weight=lsq"),
        ({"weight": partial(KMeansQuantizer, bits=3)}, "codebook8 codes.*scheme.weight=lsq scheme.weight.bits=3"),
        ({"weight": partial(TableQuantizer, bits=2, family="ternary")}, "codebook3 codes.*scheme.weight=ternary_lsq"),
        (
            {"weight": partial(MicroscalingQuantizer, bits=4, format="fp4_e2m1", granularity="per_group_32")},
            "fp4_e2m1 codes.*quantizer@scheme.weight=lsq scheme.weight.bits=4",
        ),
        (
            {"weight": partial(MicroscalingQuantizer, bits=6, format="fp6_e2m3", granularity="per_group_32")},
            "fp6_e2m3 codes.*quantizer@scheme.weight=fp8 scheme.weight.bits=8",
        ),
        (
            {"weight": partial(TableQuantizer, bits=4, double_quant=True)},
            "codebook16 codes, scales that are quantized themselves.*scheme.weight.double_quant=false",
        ),
        (
            {"weight": partial(MinMaxQuantizer, bits=4, granularity="per_flat_group_48")},
            "scales per_flat_group_48.*scheme.weight.granularity=per_channel",
        ),
        ({"weight": INT4, "input": partial(STATIC, bits=6)}, "static input of int6 codes.*scheme.input=minmax_static"),
        (
            {"weight": INT4, "input": partial(STATIC, granularity="per_channel_-1")},
            "static input with scales per_channel_-1.*scheme.input.granularity=per_tensor",
        ),
        (
            {"weight": INT4, "input": partial(MicroscalingQuantizer, format="fp8_e4m3", granularity="per_group_32")},
            "scales of the input by microscaling.*quantizer@scheme.input=minmax_token",
        ),
        (
            {"weight": INT4, "output": partial(TableQuantizer, bits=4, granularity="per_token")},
            "an? output of codebook16 codes.*quantizer@scheme.output=fp8_token",
        ),
        ({"weight": INT4, "embedding": True}, "embedding layer.*scheme.embedding=false"),
        ({"weight": INT4, "kv": qat.transforms.KVCache(TOKEN, TOKEN)}, "kv@scheme.kv=none"),
        ({"grad": TOKEN}, "scheme has none.*scheme=w4"),
    ],
    ids=[
        "table",
        "kmeans",
        "ternary table",
        "fp4",
        "fp6",
        "double",
        "groups",
        "6 bits",
        "channels",
        "microscaling",
        "output",
        "embedding",
        "kv",
        "none",
    ],
)
def test_what_it_cannot_hold_is_refused_before_training(scheme, message):
    """On the meta device, as the pipeline asks before anything is computed."""
    with torch.device("meta"):
        model = MODELS["llama"]()
    qat.prepare(model, qat.Scheme(**scheme), initialize=False)
    with pytest.raises(InputError, match=message):
        Onnx().check(model)


def test_another_model_than_a_language_model_is_refused():
    model = qat.convert(qat.prepare(nn.Sequential(nn.Linear(32, 32)), qat.Scheme(weight=INT4)))
    with pytest.raises(InputError, match="export=native"):
        Onnx().check(model)


@pytest.mark.parametrize("opset", [20, 26])
def test_an_opset_without_the_operators_is_refused(opset):
    with pytest.raises(InputError, match="21 to 25"):
        Onnx(opset)


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setattr("qat.export.onnx.target.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(InputError, match=r"onnxscript.*pip install"):
        Onnx()


def test_an_architecture_that_torch_cannot_trace_is_refused(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise torch.onnx.OnnxExporterError("no")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(InputError, match=r"cannot export GPT2LMHeadModel to ONNX.*export=native"):
        Onnx().write(converted("gpt2", INT4), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_it_is_written_completely_or_not_at_all(copied, monkeypatch):
    """What stood there stays, if the disk is full."""
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    model = Onnx().read(copied)
    monkeypatch.setattr("qat.export.onnx.graph.to_graph", lambda *_: SimpleNamespace(metadata_props={}))
    with pytest.raises(AttributeError):
        Onnx().write(model, copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="other files"):
        Onnx().write(converted("gpt2", INT4), tmp_path)


def cut(name, share):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return damage


def edited(change):
    """Damage by `change`, which is given the model's proto."""

    def damage(folder):
        file = onnx.load(folder / "model.onnx", load_external_data=False)
        change(file)
        (folder / "model.onnx").write_bytes(file.SerializeToString())

    return damage


def tensor_of(file, name):
    return next(tensor for tensor in file.graph.initializer if tensor.name == name)


def described(change):
    """Damage by `change`, which is given what the file says of one layer."""

    def damage(file):
        layers = json.loads(file.metadata_props[0].value)
        change(layers["model.layers.1.mlp.down_proj"])
        file.metadata_props[0].value = json.dumps(layers)

    return edited(damage)


def configured(**options):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | options))

    return damage


def elsewhere(file):
    place = tensor_of(file, "model.layers.1.mlp.down_proj.weight.codes").external_data
    next(entry for entry in place if entry.key == "location").value = "../other.data"


def before_the_file(file):
    place = tensor_of(file, "model.layers.1.mlp.down_proj.weight.codes").external_data
    next(entry for entry in place if entry.key == "offset").value = "-4096"


def renamed(file):
    tensor_of(file, "model.norm.weight").name = "model.norm.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("model.onnx", 0.5), "model.onnx is damaged"),
        (cut("model.onnx", 0), "written by something else"),
        (cut("model.onnx.data", 0.5), "cut short"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "cut short"),
        (lambda folder: (folder / "model.onnx").unlink(), "holds no model.onnx"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 99), "model.onnx is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (configured(hidden_size=32), "config.json says"),
        (configured(num_hidden_layers=1), "no linear layer model.layers.1"),
        (configured(num_hidden_layers=3), "lacks .* of the model's tensors"),
        (configured(vocab_size=97), "config.json says"),
        (edited(elsewhere), "not in model.onnx.data: refused"),
        (edited(before_the_file), "is damaged"),
        (edited(renamed), "lacks 1 of the model's tensors, model.norm.weight"),
        (edited(lambda file: file.metadata_props.pop()), "something else"),
        (edited(lambda file: setattr(file.metadata_props[0], "value", "[1]")), "is damaged"),
        (edited(lambda file: setattr(file.metadata_props[0], "value", '{"a": {}}')), "not described"),
        (described(lambda layer: layer["weight"].update(format="int8")), "INT4.*should be INT8"),
        (described(lambda layer: layer["weight"].update(format="int3")), "codes that int3 has not"),
        (described(lambda layer: layer["weight"].update(format="codebook16")), "no type of ONNX"),
        (described(lambda layer: layer["weight"].update(granularity="per_group_64")), "does not fit|is not what"),
        (described(lambda layer: layer["weight"].update(shape=[32, 256])), "should be INT4"),
        (described(lambda layer: layer["weight"].pop("scale")), "is damaged"),
        (described(lambda layer: layer.update(input={"format": "int8"})), "is damaged"),
    ],
)
def test_damaged_files_give_one_clear_error(damage, message, copied):
    damage(copied)
    with pytest.raises(InputError, match=message):
        Onnx().read(copied)
