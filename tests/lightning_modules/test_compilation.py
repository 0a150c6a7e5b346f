"""Compiled blocks are one graph, and compute what they compute without one, to the bit where nothing is fused."""

import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import qat
from lightning_modules.callbacks import (
    CodebookRefresh,
    LastCheckpoint,
    PruneSchedule,
    QuantizerMonitor,
    SmoothStart,
    SoftKMeans,
)
from lightning_modules.callbacks.smooth_start import activation_quantizers
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.compilation import CompiledBlocks, check_cuda_graphs
from qat.errors import InputError
from qat.kernels import linear
from qat.quantizers import KMeansQuantizer, LSQQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import LSQ3, TOKEN8, fit
from tests.models import LANGUAGE_MODELS
from tests.quantizers.test_contract import make, quantizers
from tests.test_configs import composed

# Compiling takes as long as a block has quantizers: two of seven layers do where the test is of what surrounds a graph.
TWO = ("*.[qko]_proj", "*.gate_proj", "*.up_proj")
CODES8 = qat.Scheme(weight=partial(LSQQuantizer, bits=8), input=TOKEN8, compute="int8", exclude=TWO)
SCHEMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "scheme").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()


def gradients(model, compute):
    """The loss and every gradient of one step; stochastic rounding draws the same numbers each time."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = compute()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def step_of(model, ids):
    return gradients(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def check_one_graph(model, ids):
    """Every block computes the same to the bit, and all blocks share one graph."""
    expected, counter = step_of(model, ids), CompileCounterWithBackend("aot_eager")
    compiled = CompiledBlocks(model, "aot_eager")
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True)
    assert_equal(step_of(model, ids), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("path", list(quantizers()))
def test_every_quantizer_traces_without_a_break(path):
    factory = partial(make, path)
    layer = nn.Sequential(nn.Linear(192, 32))
    role = "grad" if path.stem.startswith("grad") else "weight"
    if path.stem in ("minmax_token", "minmax_static", "fp8_token", "fp8_static"):
        role = "input"
    others = {} if role == "grad" else {"weight": LSQ3}
    model = qat.prepare(layer, qat.Scheme(**others | {role: lambda shape: factory(shape)})).train()
    x = torch.randn(8, 192)
    qat.calibrate(model, [x])
    expected = gradients(model, lambda: model(x).square().mean())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(gradients(model, lambda: compiled(x).square().mean()), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_one_graph(scheme, tmp_path):
    model = qat.prepare(tiny_llama(), instantiate(composed(tmp_path, f"scheme={scheme}").scheme))
    check_one_graph(model.train(), torch.randint(0, 96, (2, 16)))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_blocks_of_every_architecture_are_one_graph(name):
    model = qat.prepare(LANGUAGE_MODELS[name](), qat.Scheme(weight=LSQ3, input=TOKEN8, embedding=True))
    check_one_graph(model.train(), torch.randint(0, 96, (2, 16)))


def fitted(folder, compile, *callbacks, kmeans=False, **options):
    """The state after four steps, and what was logged."""
    torch.manual_seed(0)
    weight = partial(KMeansQuantizer, bits=3) if kmeans else LSQ3
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=weight, input=TOKEN8, exclude=TWO))
    settings = {"gradient_checkpointing": options.pop("gradient_checkpointing", False), "compile": compile}
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), **settings)
    rows = fit(folder, module, *callbacks, **options)
    assert not any(m._compiled_call_impl for m in module.modules())
    return dict(module.state_dict()), rows


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        (lambda: [QuantizerMonitor(every_n_steps=2)], {}),
        (lambda: [SmoothStart(ramp_steps=2), PruneSchedule(sparsity=0.5, every_n_steps=1, end_step=2)], {}),
        (lambda: [CodebookRefresh(1), SoftKMeans(steps=2)], {"kmeans": True}),
        (list, {"gradient_checkpointing": True, "precision": "bf16-mixed", "accumulate_grad_batches": 2}),
    ],
    ids=["monitor", "smooth start, pruning", "codebooks", "checkpointing"],
)
def test_a_compiled_fit_ends_with_the_same_bits(tmp_path, callbacks, options):
    expected, rows = fitted(tmp_path / "eager", None, *callbacks(), **options)
    found, compiled_rows = fitted(tmp_path / "compiled", "aot_eager", *callbacks(), **options)
    assert [name for name in expected if not _same(found[name], expected[name])] == []
    assert found.keys() == expected.keys()
    assert compiled_rows == rows


def _same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_checkpoints_know_nothing_of_it(tmp_path):
    for compile in (None, "aot_eager"):
        fitted(tmp_path, compile, LastCheckpoint(str(tmp_path / str(compile))))
    plain, compiled = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("None", "aot_eager")
    )
    assert plain.keys() == compiled.keys()
    assert not any("_orig_mod" in name for name in compiled)


@pytest.mark.slow
def test_blocks_with_other_bits_get_other_graphs():
    """More of them than the graphs that torch keeps of one function by itself."""
    grids = [(bits, granularity) for granularity in ("per_channel", "per_group_32") for bits in range(2, 7)]
    rules = {
        f"layer{i}": qat.Rule(f"*.layers.{i}.*", weight=partial(LSQQuantizer, bits=bits, granularity=granularity))
        for i, (bits, granularity) in enumerate(grids)
    }
    model = qat.prepare(tiny_llama(num_hidden_layers=len(grids)), qat.Scheme(rules=rules, exclude=TWO)).train()
    ids = torch.randint(0, 96, (2, 16))
    expected = step_of(model, ids)
    with CompiledBlocks(model, "aot_eager").step():
        found = step_of(model, ids)
    assert_equal(found, expected)


def test_batches_of_other_sizes():
    """As when evaluating: more rows than in training, and fewer in the last batch."""
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ3, input=TOKEN8, exclude=TWO)).train()
    ids = torch.randint(0, 96, (5, 16))
    with torch.no_grad():
        expected = [model(rows, use_cache=False).logits for rows in (ids[:1], ids[:4], ids, ids[:3])]
    compiled = CompiledBlocks(model, "aot_eager")
    with compiled.step():
        step_of(model, ids[:1])
        with torch.no_grad():
            found = [model.eval()(rows, use_cache=False).logits for rows in (ids[:1], ids[:4], ids, ids[:3])]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_loss_that_is_no_number_is_explained(tmp_path):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3), compile="aot_eager")
    with torch.no_grad():
        module.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"non-finite output: model.layers.1.mlp.up_proj"):
        fit(tmp_path, module)


class Broken(Exception):
    pass


class Breaks(pl.Callback):
    def on_train_batch_end(self, *arguments):
        raise Broken


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks"])
@torch._dynamo.config.patch(recompile_limit=8)  # other tests leave theirs
def test_after_a_fit_the_process_is_as_before(tmp_path, breaks):
    """Also after one that an exception ends: limits of the compiler, graphs, and what else is for a fit only."""
    config = torch._dynamo.config
    limits, seen = (config.recompile_limit, config.accumulated_recompile_limit), []
    module = CausalLMModule(tiny_llama(num_hidden_layers=3), partial(torch.optim.AdamW, lr=1e-3), compile="aot_eager")
    look = pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: seen.append(config.recompile_limit))
    with pytest.raises(Broken) if breaks else nullcontext():
        fit(tmp_path, module, look, *([Breaks()] if breaks else []))
    assert seen[0] > limits[0]
    assert (config.recompile_limit, config.accumulated_recompile_limit) == limits
    assert module.compiled is None
    assert module.head_loss is None
    assert not any(m._compiled_call_impl for m in module.modules())


def test_what_cannot_be_compiled_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"module.compile is 'inducktor'. Did you mean 'inductor'"):
        CompiledBlocks(tiny_llama(), "inducktor")
    with pytest.raises(InputError, match="has no list of blocks"):
        CompiledBlocks(nn.Sequential(nn.Linear(2, 2)), "aot_eager")
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3), compile="aot_eager")
    mlp = module.model.model.layers[0].mlp
    mlp.forward = lambda x: (torch._dynamo.graph_break(), x)[1]
    with pytest.raises(InputError, match=r"cannot compile the blocks of LlamaForCausalLM: .*Leave it out"):
        fit(tmp_path, module)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("scheme", [qat.Scheme(weight=LSQ3, exclude=TWO), CODES8], ids=["int3", "codes"])
def test_inductor_computes_the_same_but_for_rounding(scheme):
    """Scales stay rounded to bfloat16: left in float32 they move a gradient by half of the largest."""
    model = qat.prepare(tiny_llama(num_hidden_layers=1), scheme).train()
    ids = torch.randint(0, 96, (2, 16))
    expected = step_of(model, ids)
    with CompiledBlocks(model, "inductor").step():
        found = step_of(model, ids)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


def test_activations_quantized_in_part_are_one_graph():
    """While their strength rises; one more afterwards, which knows of none."""
    model = qat.prepare(tiny_llama(num_hidden_layers=3), qat.Scheme(weight=LSQ3, input=TOKEN8)).train()
    ids, counter = torch.randint(0, 96, (2, 16)), CompileCounterWithBackend("aot_eager")
    compiled = CompiledBlocks(model, "aot_eager")
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True)
    for strength, graphs in ((torch.tensor(0.0), 1), (torch.tensor(0.25), 1), (torch.tensor(1.0), 1), (None, 2)):
        for quantizer in activation_quantizers(model):
            quantizer.strength = strength
        with torch.compiler.set_stance("force_eager"):
            expected = step_of(model, ids)
        with compiled.step():
            assert_equal(step_of(model, ids), expected)
        assert counter.frame_count == graphs


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({}, "module.compile=inductor"),
        ({"compile": "aot_eager"}, "module.compile=inductor"),
        ({"compile": "inductor"}, "trainer.accelerator=gpu"),
    ],
    ids=str,
)
def test_cuda_graphs_are_refused_where_there_are_none(options, mend, tmp_path):
    with pytest.raises(InputError, match=mend):
        fit(tmp_path, CausalLMModule(tiny_llama(), torch.optim.AdamW, cuda_graphs=True, **options))


@pytest.mark.parametrize(
    ("changed", "mend"),
    [
        ({"accumulate_grad_batches": 2}, "data.batch_size"),
        ({"callbacks": [GradientAccumulationScheduler({1: 2})]}, "data.batch_size"),
        ({"world_size": 2}, "trainer.devices=1"),
        ({}, "module.gradient_checkpointing=false"),
    ],
    ids=["accumulated", "scheduled", "devices", "checkpointed"],
)
def test_cuda_graphs_are_refused_where_gradients_outlive_a_step_or_blocks_run_twice(changed, mend):
    trainer = SimpleNamespace(**({"accumulate_grad_batches": 1, "world_size": 1, "callbacks": []} | changed))
    with pytest.raises(InputError, match=mend):
        check_cuda_graphs(trainer, "cuda", checkpointing=not changed)


def test_only_inductor_records_cuda_graphs():
    with pytest.raises(InputError, match=r"module\.compile=inductor"):
        CompiledBlocks(tiny_llama(), "aot_eager", cuda_graphs=True)


def test_a_head_outside_of_the_graphs_runs_its_own_kernels(monkeypatch):
    """Plain operators for a compiler are many passes where there is none."""
    scheme = qat.Scheme(weight=LSQ3, exclude=TWO, head=True)
    model = qat.prepare(tiny_llama(num_hidden_layers=1), scheme).train()
    monkeypatch.setattr(linear, "_plain", None)
    with linear.fused_by_a_compiler():
        step_of(model, torch.randint(0, 96, (2, 16)))
