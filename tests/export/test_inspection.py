"""`qat-inspect`: what it says of each layer, and that it finds what is wrong."""

import math
import sys
from functools import partial

import pytest
import torch

import qat
from lightning_modules import inspection
from qat.export.checkpoint import Checkpoint
from qat.export.inspection import inspect
from qat.export.layouts.gptq import Gptq
from qat.numerics.metrics import sqnr
from qat.quantizers import LSQQuantizer, TableQuantizer
from tests.export.exported import MODELS, converted

INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
LAYER = "model.layers.0.mlp.down_proj"


def reports(model, reference=None):
    return {report.name: report for report in inspect(model, reference)}


def test_every_weight_once_with_its_grid():
    rules = {"down": qat.Rule("*.down_proj", weight=partial(TableQuantizer, bits=3))}
    model = converted("llama, tied", INT4, rules=rules, embedding=True, head=True)
    found = reports(model)
    assert len(found) == 15  # seven in each block, and the embedding that the head shares
    q_proj, down = found["model.layers.0.self_attn.q_proj.weight"], found[f"{LAYER}.weight"]
    assert q_proj[1:5] == ("int4", "per_group_32", "bfloat16", 4.5)
    assert down[1:4] == ("codebook8", "per_group_64", "float32")
    assert not any(report.flags for report in found.values())


def test_the_ratio_is_that_of_the_reference():
    torch.manual_seed(0)
    plain = MODELS["gpt2, transposed"]()
    model = converted("gpt2, transposed", INT4)
    reference = {f"{name}.weight": layer.weight.t() for name, layer in plain.named_modules() if hasattr(layer, "nf")}
    for name, report in reports(model, reference).items():
        packed = model.get_submodule(name.removesuffix(".weight")).weight
        assert report.sqnr == pytest.approx(sqnr(reference[name], packed.dequantize()))
        assert 15 < report.sqnr < 30


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("scale", math.nan, "scales that are not finite"),
        ("scale", 0.0, "scales that are not positive"),
        ("codes", 0x99, "4 bits, of which 0 are used"),  # two codes of one value
        ("codes", 0x88, "nothing but zeros"),
    ],
)
def test_what_is_suspicious_is_flagged(field, value, flag):
    model = converted("llama, tied", INT4)
    getattr(model.get_submodule(LAYER).weight, field).fill_(value)
    found = reports(model)
    assert flag in found[f"{LAYER}.weight"].flags
    assert [name for name, report in found.items() if report.flags] == [f"{LAYER}.weight"]


def test_another_model_is_told_by_its_weights():
    model, reference = converted("llama, tied", INT4), dict(MODELS["llama, tied"]().named_parameters())
    assert all("unlike the reference" in report.flags for report in inspect(model, reference))
    assert all("the reference has no such weight" in report.flags for report in inspect(model, {}))


def test_the_command(tmp_path, monkeypatch, capsys, tiny_folder, signals_restored):
    folder = Checkpoint(Gptq()).write(converted("llama, tied", INT4), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qat-inspect", str(folder), f"reference={tiny_folder}"])
    inspection.main()
    output = capsys.readouterr().out
    assert f"{folder}: GPTQ" in " ".join(output.split())
    assert output.count("int4") == 14
    assert "4.500 bits a quantized weight" in output
    monkeypatch.setattr(sys, "argv", ["qat-inspect", str(tmp_path / "absent")])
    with pytest.raises(SystemExit):
        inspection.main()
    assert "is not an artifact of this project" in capsys.readouterr().err
