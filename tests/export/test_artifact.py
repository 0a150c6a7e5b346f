import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.export.artifact import bits_per_weight
from qat.nn.kv_cache import QuantizedCache
from qat.quantizers import (
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NoQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
)
from qat.transforms import KVCache
from tests.conftest import tiny_llama
from tests.models import tiny_mixtral
from tests.nn.kv_models import LAYOUTS
from tests.transforms.test_prepare import SCHEMES, prepared, tokens


@pytest.fixture
def artifact(tmp_path):
    return qat.save(qat.convert(prepared(SCHEMES["lsq"])), tmp_path / "artifact")


def test_bits_per_weight_are_what_lies_on_disk(artifact):
    from safetensors.torch import load_file

    model = qat.load(artifact)
    tensors = {k: t for k, t in load_file(artifact / "model.safetensors").items() if ".weight." in k}
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    weights = sum(m.weight.shape.numel() for m in model.modules() if isinstance(m, qat.nn.PackedLinear))
    assert bits_per_weight(model) == stored / weights == 3.5
    assert bits_per_weight(prepared(SCHEMES["lsq"])) == 3.5


def test_shared_weights_count_once_after_loading_too(tmp_path):
    def net():
        first, second, third = (nn.Linear(64, 64, bias=False) for _ in range(3))
        second.weight = first.weight
        return nn.Sequential(first, second, third)

    rules = {"last": qat.Rule("2", weight=partial(MinMaxQuantizer, bits=2))}
    model = qat.prepare(net(), qat.Scheme(weight=partial(MinMaxQuantizer, bits=8), rules=rules))
    before = bits_per_weight(model)
    loaded = qat.load(qat.save(qat.convert(model), tmp_path / "net"), net())
    assert before == bits_per_weight(model) == bits_per_weight(loaded) == (8 + 2) / 2 + 16 / 64


def test_loading_needs_neither_hydra_nor_lightning(artifact):
    code = (
        f"import sys, qat; qat.load({str(artifact)!r}); "
        "assert not {'hydra', 'pytorch_lightning', 'omegaconf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_module_loads_into_its_architecture(tmp_path):
    def net():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))

    model = qat.convert(qat.prepare(net(), SCHEMES["lsq"])).eval()
    loaded = qat.load(qat.save(model, tmp_path / "net"), net())
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", [*SCHEMES, "static_codebook", "microscaling"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_model_of_low_precision_is_loaded_as_it_trained(name, cast, tmp_path):
    """As `trainer.precision=bf16-true` casts both; scales and codebooks in float32 are the trained ones still."""
    static = partial(MinMaxQuantizer, granularity="per_tensor", dynamic=False, scale_dtype="float32")
    more = {
        "static_codebook": qat.Scheme(weight=partial(TableQuantizer, bits=3), input=static, output=static, head=True),
        "microscaling": qat.Scheme(weight=NVFP4Quantizer, input=MicroscalingQuantizer, embedding=True),
    }
    model, ids = prepared((SCHEMES | more)[name]).to(cast), tokens()
    with torch.no_grad():
        trained = model(ids).logits
        converted = qat.convert(model)
        assert torch.equal(converted.to(cast)(ids).logits, trained)
        loaded = qat.load(qat.save(converted, tmp_path / "artifact"))
        assert torch.equal(loaded.to(cast)(ids).logits, trained)
        again = qat.load(qat.save(loaded, tmp_path / "again"))
        assert torch.equal(again.to(cast)(ids).logits, trained)


def test_artifacts_of_version_1_still_load():
    """`version1` was written by format_version 1, which knew linear layers only and named no kinds."""
    folder = Path(__file__).parent / "version1"
    assert json.loads((folder / "quant_config.json").read_text())["format_version"] == 1
    model = qat.load(folder, nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)))
    expected = [[0.27157437, -0.03385983, 0.09713125], [0.11150853, -0.05705087, 0.07341105]]
    assert torch.allclose(model(torch.linspace(-2, 2, 32).view(2, 16)), torch.tensor(expected), atol=1e-6)
    assert type(model[0].input_quantizer) is qat.nn.StoredActivation


def test_the_config_names_kinds(tmp_path):
    model = qat.prepare(tiny_mixtral(), qat.Scheme(weight=SCHEMES["lsq"].weight, embedding=True))
    config = json.loads((qat.save(qat.convert(model), tmp_path / "a") / "quant_config.json").read_text())
    assert config["format_version"] == 3
    kinds = {name: layer["kind"] for name, layer in config["layers"].items()}
    assert kinds["model.embed_tokens"] == "embedding"
    assert kinds["model.layers.0.self_attn.q_proj"] == "linear"
    assert kinds["model.layers.1.mlp.experts"] == "experts"
    assert config["layers"]["model.layers.1.mlp.experts"]["weights"].keys() == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Conv1d(64, 64, 1)), "has no layer 2"),
        (nn.Sequential(nn.Conv1d(64, 64, 1), nn.ReLU(), nn.ReLU()), "whose 2 is a ReLU"),
    ],
    ids=["missing", "another kind"],
)
def test_an_architecture_of_other_layers_is_refused(net, message, tmp_path):
    layers = nn.Sequential(nn.Conv1d(64, 64, 1), nn.ReLU(), nn.Conv1d(64, 64, 1))
    artifact = qat.save(qat.convert(qat.prepare(layers, SCHEMES["lsq"])), tmp_path / "a")
    with pytest.raises(InputError, match=f"does not fit the model.*{message}"):
        qat.load(artifact, net)


def test_saving_replaces_the_folder_whole(artifact):
    (artifact / "old").write_text("x")
    qat.save(qat.load(artifact), artifact)
    assert not (artifact / "old").exists()
    assert not list(artifact.parent.glob(".*"))


def test_saving_spares_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        qat.save(qat.convert(prepared(SCHEMES["lsq"])), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "x"


def test_an_unconverted_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"Call qat.convert"):
        qat.save(tiny_llama(), tmp_path)


def damage(artifact, kind):
    weights, config = artifact / "model.safetensors", artifact / "quant_config.json"
    if kind == "missing":
        config.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif kind == "not json":
        config.write_text("{")
    elif kind == "newer":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 99}))
    elif kind == "incomplete":
        settings = json.loads(config.read_text())
        del settings["layers"]
        config.write_text(json.dumps(settings))
    elif kind == "garbled":
        settings = json.loads(config.read_text())
        del next(iter(settings["layers"].values()))["weights"]["weight"]["granularity"]
        config.write_text(json.dumps(settings))


def test_a_full_disk_leaves_the_old_artifact_and_one_line(artifact, monkeypatch):
    model = qat.load(artifact)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qat.export.tensor_files._write_file", fail)
    with pytest.raises(InputError, match=r"Cannot write .*No space left on device.* Free space"):
        qat.save(model, artifact)
    qat.load(artifact)
    assert not list(artifact.parent.glob(".*"))


def test_a_large_model_is_written_in_shards(tmp_path):
    model, ids = qat.convert(prepared(SCHEMES["lsq"])), tokens()
    folder = qat.save(model, tmp_path / "a", shard_bytes=2**14)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(qat.load(folder)(ids).logits, model(ids).logits)
    missing = sorted(folder.glob("model-*"))[1]
    missing.unlink()
    with pytest.raises(InputError, match=f"lacks {missing.name}"):
        qat.load(folder)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_trained_is_the_one_that_is_loaded(tmp_path, attention):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    artifact = qat.save(qat.convert(qat.prepare(model, SCHEMES["lsq"])), tmp_path / "artifact")
    assert qat.load(artifact).config._attn_implementation == attention


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is not an artifact"),
        ("truncated", "damaged: its checksum"),
        ("flipped", "damaged: its checksum"),
        ("not json", "is damaged"),
        ("newer", "format_version 99"),
        ("incomplete", "no layers"),
        ("garbled", r"damaged at layer model.layers.0.self_attn.q_proj \(KeyError\('granularity'\)\)"),
    ],
)
def test_a_damaged_artifact_is_refused_in_one_line(artifact, kind, message):
    damage(artifact, kind)
    with pytest.raises(InputError, match=message):
        qat.load(artifact)


def test_an_artifact_of_another_model_is_refused(artifact):
    with pytest.raises(InputError, match="does not fit"):
        qat.load(artifact, tiny_llama(num_hidden_layers=3))


def test_generation_works_from_an_artifact(artifact):
    out = qat.load(artifact).generate(tokens(1), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 21)


@pytest.mark.parametrize(
    "weight", [partial(LSQQuantizer, bits=4, granularity="per_group_32"), NoQuantizer], ids=["w4", "w16"]
)
@pytest.mark.parametrize("name", ["int4", "kivi4_window8", "static", "nf4"])
def test_a_quantized_cache_is_stored_and_serves(name, weight, tmp_path):
    """Whole passes give the trained model's bits, and generation goes on with packed codes."""
    key, value, window = LAYOUTS[name]
    scheme = qat.Scheme(weight=weight, kv=KVCache(key, value, window))
    model = qat.prepare(tiny_llama(), scheme).eval()
    ids = torch.randint(0, 96, (2, 24))
    qat.calibrate(model, [{"input_ids": ids, "use_cache": False}])
    with torch.no_grad():
        trained = model(ids, use_cache=False).logits
        loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact"))
        assert torch.equal(loaded(ids, use_cache=False).logits, trained)
        cache = loaded(ids).past_key_values
    assert isinstance(cache, QuantizedCache)
    layers, batch, heads, head_dim = 2, 2, 2, 16
    assert cache.nbytes < 2 * layers * batch * heads * 24 * head_dim * 4
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
