import math
from functools import partial

import torch

import qat
from lightning_modules.callbacks import ProgressBar
from lightning_modules.callbacks.monitor import measure
from lightning_modules.causal_lm import CausalLMModule, first_non_finite, parameter_groups
from lightning_modules.loggers import CSVLogger
from lightning_modules.report import Report, plot_training
from qat.quantizers import KMeansQuantizer, LSQQuantizer
from qat.transforms import quant_linears
from tests.conftest import tiny_llama

LSQ3 = partial(LSQQuantizer, bits=3, granularity="per_group_32")


def test_every_parameter_is_in_one_group():
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3))
    groups = {group["name"]: group for group in parameter_groups(model, quantizer_lr=0.5)}
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert groups["quantizers"]["lr"] == 0.5
    assert groups["quantizers"]["weight_decay"] == groups["vectors"]["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in groups["matrices"]["params"])
    assert len(groups["quantizers"]["params"]) == 14


def test_the_first_layer_with_a_nan_is_found():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    ids = torch.randint(0, 96, (1, 8))
    assert first_non_finite(model, {"input_ids": ids}) == "model.layers.1.mlp.up_proj"
    assert first_non_finite(tiny_llama(), {"input_ids": ids}) is None
    assert not any(module._forward_hooks for module in model.modules())


def test_the_monitor_measures_what_it_says():
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3))
    _, layer = next(quant_linears(model))
    figures = measure(layer)
    assert 8 < figures["sqnr"] < 20
    assert figures["code_use"] == 1
    with torch.no_grad():
        layer.weight_quantizer.log_scale -= 2  # a quarter of the scale: most weights lie beyond the grid
    assert measure(layer)["clipped"] > figures["clipped"] + 0.3
    codebook = qat.prepare(tiny_llama(), qat.Scheme(weight=partial(KMeansQuantizer, bits=4)))
    assert measure(next(quant_linears(codebook))[1])["clipped"] == 0


def test_computed_buffers_keep_their_dtype():
    module = CausalLMModule(tiny_llama(), torch.optim.AdamW)
    module.to(torch.bfloat16)
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert module.model.lm_head.weight.dtype == torch.bfloat16


def test_the_csv_goes_on_where_it_stopped(tmp_path):
    first = CSVLogger(str(tmp_path))
    first.log_metrics({"a": 1.0}, step=0)
    first.log_metrics({"b": 2.0}, step=1)
    first.finalize("failed")
    second = CSVLogger(str(tmp_path))
    second.log_metrics({"a": 3.0}, step=2)
    second.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,a,b", "0,1.0,", "1,,2.0", "2,3.0,"]


def test_the_report_keeps_its_rows(tmp_path):
    Report(tmp_path, "title").add("fp", step=3, perplexity=2.0, bits_per_weight=32.0)
    assert Report(tmp_path, "title").has("fp", 3)
    assert not Report(tmp_path, "title").has("fp", 4)
    assert not Report(tmp_path, "title", resume=False).has("fp", 3)


def test_the_picture_needs_something_to_draw(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,val/loss\n0,1.0\n")
    assert not plot_training(metrics, tmp_path / "p.png", "title")
    metrics.write_text("step,train/loss,sqnr/a.q_proj\n0,2.0,10\n1,,11\n2,1.0,inf\n")
    assert plot_training(metrics, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_remaining_time_is_that_of_the_run(monkeypatch, capsys):
    """2 s a step, 10 of 40 steps done after resuming at 5: 60 s left."""
    now = [100.0]
    monkeypatch.setattr("lightning_modules.callbacks.progress.time.monotonic", lambda: now[0])
    bar = ProgressBar(line_every_s=1)
    bar._begin("training", 40, 5)
    for done in range(6, 11):
        now[0] += 2.0
        bar._advance(done, "loss 1.000")
    assert "training 10/40  loss 1.000  60 s left" in capsys.readouterr().out


def test_a_batch_with_nothing_to_learn_teaches_nothing():
    model = tiny_llama()
    module = CausalLMModule(model, torch.optim.AdamW)
    ids = torch.randint(0, 96, (1, 8))
    loss = module._loss({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
