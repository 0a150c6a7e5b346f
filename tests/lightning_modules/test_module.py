import math
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import qat
from lightning_modules.callbacks import GracefulStop, LastCheckpoint, ProgressBar, QuantizerMonitor, Stopped
from lightning_modules.callbacks.monitor import measure_weight
from lightning_modules.causal_lm import CausalLMModule, first_non_finite, parameter_groups
from lightning_modules.loggers import CSVLogger
from lightning_modules.pipeline import Job
from lightning_modules.report import Report, plot_training
from qat.errors import InputError
from qat.kernels import ops
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms import quant_layers
from tests.conftest import tiny_llama
from tests.models import tiny_mixtral
from tests.test_configs import composed

TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
LSQ3 = partial(LSQQuantizer, bits=3, granularity="per_group_32")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"compile": "inducktor"}, "module.compile is 'inducktor'. Did you mean 'inductor'"),
        ({"cuda_graphs": True}, "set module.compile=inductor"),
        ({"loss": "chunkt"}, "module.loss is 'chunkt'. Did you mean 'chunked'"),
    ],
    ids=["compile", "cuda_graphs", "loss"],
)
def test_options_that_are_none_are_refused_before_anything_is_loaded(option, message, tmp_path):
    """By the module itself, and by a run before it loads a model."""
    with pytest.raises(InputError, match=message):
        CausalLMModule(tiny_llama(), torch.optim.AdamW, **option)
    words = [f"module.{name}={value}" for name, value in option.items()]
    with pytest.raises(InputError, match=message):
        Job(composed(tmp_path, "model=hf", "model.name=/nowhere", *words))


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
    quantized = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3, input=TOKEN8))
    with torch.no_grad():
        quantized.model.layers[1].mlp.up_proj.weight_quantizer.log_scale[0, 0] = math.nan
    assert first_non_finite(quantized, {"input_ids": ids}) == "model.layers.1.mlp.up_proj"


def test_the_monitor_measures_what_it_says():
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3))
    _, layer = next(quant_layers(model))
    figures = measure_weight(layer.weight_quantizer, layer.weight)
    assert 8 < figures["sqnr"] < 20
    assert figures["code_use"] == 1
    with torch.no_grad():
        layer.weight_quantizer.log_scale -= 2  # a quarter of the scale: most weights lie beyond the grid
    assert measure_weight(layer.weight_quantizer, layer.weight)["clipped"] > figures["clipped"] + 0.3
    codebook = KMeansQuantizer(layer.weight.shape, bits=4)
    codebook.initialize(layer.weight)
    assert measure_weight(codebook, layer.weight)["clipped"] == 0


def test_the_weights_of_experts_are_monitored_by_name():
    model = qat.prepare(tiny_mixtral(), qat.Scheme(weight=LSQ3, embedding=True))
    found = []
    monitor = QuantizerMonitor()
    monitor._log = lambda trainer, what, measured, step: found.append(measured)
    monitor._log_weights(SimpleNamespace(global_step=0), model)
    assert {"layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj", "embed_tokens"} <= found[0].keys()
    assert all(10 < figures["sqnr"] < 25 for figures in found[0].values())


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
        bar._advance(done, lambda: "loss 1.000")
    assert "training 10/40  loss 1.000  60 s left" in capsys.readouterr().out


def test_an_evaluation_with_nothing_to_learn_is_refused():
    module = CausalLMModule(tiny_llama(), torch.optim.AdamW)
    module.on_validation_epoch_start()
    module.all_gather = lambda tensor: tensor
    with pytest.raises(InputError, match="hold no answer"):
        module.on_validation_epoch_end()


def test_a_batch_with_nothing_to_learn_teaches_nothing():
    model = tiny_llama()
    module = CausalLMModule(model, torch.optim.AdamW)
    ids = torch.randint(0, 96, (1, 8))
    loss = module._loss({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


class Batches(pl.LightningDataModule):
    def train_dataloader(self):
        ids = torch.randint(0, 96, (4, 8), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)


class Records(CSVLogger):
    """Keeps the metrics in memory."""

    @property
    def metrics(self):
        return self._rows


def fit(tmp_path, module, *callbacks, ckpt_path=None, **options):
    logger = Records(str(tmp_path))
    settings = {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=list(callbacks), logger=logger, **(settings | options))
    trainer.fit(module, datamodule=Batches(), ckpt_path=ckpt_path, weights_only=True)
    return logger.metrics


def test_weights_and_activations_are_monitored_to_the_last_step(tmp_path):
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3, input=TOKEN8))
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3))
    rows = fit(tmp_path, module, QuantizerMonitor(every_n_steps=2), max_steps=-1, max_epochs=2)
    layer = "model.layers.0.self_attn.q_proj"
    assert [step for step, row in rows.items() if f"sqnr/{layer}" in row] == [0, 2, 4]
    assert [step for step, row in rows.items() if f"sqnr/{layer}.input" in row] == [0, 2]
    assert rows[0]["activations/sqnr"] > 30 > rows[0]["quantizers/sqnr"] > 8
    assert rows[2]["activations/clipped"] == 0
    assert not any(m._forward_hooks for m in model.modules())


def test_a_gradient_that_is_no_number_stops_before_the_weights(tmp_path):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3))
    parameter = module.model.model.layers[1].mlp.up_proj.weight
    parameter.register_hook(lambda grad: grad * math.nan)
    before = parameter.detach().clone()
    with pytest.raises(InputError, match=r"gradients became nan at step 0. First at fault: .*layers.1.mlp.up_proj"):
        fit(tmp_path, module)
    assert torch.equal(parameter, before)


def test_a_checkpoint_with_weights_that_are_no_numbers_is_not_written(tmp_path):
    class Break(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 2:
                pl_module.model.lm_head.weight.data[0, 0] = math.inf

    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3))
    last = LastCheckpoint(str(tmp_path), every_n_steps=1)
    with pytest.raises(InputError, match=r"no longer finite after step 2.* the one of step 1 is kept"):
        fit(tmp_path, module, Break(), last)
    assert torch.load(last.path, weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": "abc"}])
def test_options_that_an_optimizer_refuses_get_one_line(tmp_path, options):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, **options))
    with pytest.raises(InputError, match="The optimizer or its scheduler refused an option"):
        fit(tmp_path, module)


def test_a_signal_during_the_last_step_stops_too(tmp_path):
    class Signal(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGTERM)

    stop, last = GracefulStop(), LastCheckpoint(str(tmp_path))
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3))
    with pytest.raises(Stopped, match="step 4 on SIGTERM"):
        fit(tmp_path, module, Signal(), stop, last)
    assert torch.load(last.path, weights_only=True)["global_step"] == 4


def test_codes_of_weights_are_found_once_a_step(tmp_path, monkeypatch):
    calls, quantize = [], ops.quantize_view
    monkeypatch.setattr(ops, "quantize_view", lambda *arguments: calls.append(1) or quantize(*arguments))
    model = qat.prepare(tiny_llama(num_hidden_layers=1), qat.Scheme(weight=LSQ3))
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), loss="model")
    fit(tmp_path, module, max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
    assert len(calls) == 2 * 7
    assert module.codes is None
