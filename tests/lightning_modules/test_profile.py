"""The table of a step's time and memory adds up, and names things rightly."""

import json
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.profiler import profile

import qat
from lightning_modules import attribution
from lightning_modules.callbacks import Profile
from lightning_modules.callbacks.profile import notes, table
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.quantizers import LSQQuantizer, Quantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_compilation import TWO
from tests.lightning_modules.test_module import TOKEN8, fit

W4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")


class Clock(pl.Callback):
    """Seconds of every optimizer step, from the start of one batch to that of the next."""

    def __init__(self):
        self.starts = []

    def on_train_batch_start(self, *args):
        self.starts.append(time.perf_counter())


def profiled(folder, scheme, **options):
    """What profile.json says of steps 2 and 3 of 4."""
    model = qat.prepare(tiny_llama(hidden_size=256, intermediate_size=1024), scheme)
    module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3, fused=True), **options)
    clock = Clock()
    fit(folder, module, clock, Profile(str(folder), steps=2, warmup=1))
    assert not any("qparams" in vars(m) for m in model.modules() if isinstance(m, Quantizer))
    found = json.loads((folder / "profile.json").read_text())
    return found, {row["what"]: row for row in found["time"]}, clock.starts


@pytest.mark.parametrize("compile", [None, "aot_eager"])
def test_the_categories_add_up_to_the_step(tmp_path, compile):
    found, times, starts = profiled(tmp_path, qat.Scheme(weight=W4, input=TOKEN8), compile=compile)
    assert list(times) == [category for category in attribution.CATEGORIES if category != attribution.FUSED]
    assert found["notes"] == []
    assert sum(row["ms"] for row in times.values()) == pytest.approx(found["ms_a_step"])
    assert sum(row["share"] for row in times.values()) == pytest.approx(1)
    # Within the clock of the steps themselves; torch takes its time to begin and to end recording.
    assert found["ms_a_step"] < 1e3 * (starts[3] - starts[1]) / 2
    assert all(row["ms"] > 0 and row["calls"] > 0 for row in times.values())
    assert times["fake quantization"]["share"] > 0.05


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_the_compiler_fused_has_a_row_and_a_note(tmp_path):
    torch._dynamo.reset()
    found, times, _ = profiled(tmp_path, qat.Scheme(weight=W4, input=TOKEN8, exclude=TWO), compile="inductor")
    assert list(times) == list(attribution.CATEGORIES)
    assert times["fused by the compiler"]["ms"] > 0
    assert sum(row["ms"] for row in times.values()) == pytest.approx(found["ms_a_step"])
    (note,) = found["notes"]
    assert note.startswith("fused by the compiler: norms")
    assert table(found).caption == note


def event(name, *kernels, parent=None):
    """An operator that launches `kernels`, of a microsecond each, as torch's profiler records it on a GPU."""
    spans = SimpleNamespace(start=0 if parent is None else parent.time_range.start + 1, end=1000)
    own = [SimpleNamespace(name=kernel, duration=1.0) for kernel in kernels]
    kind = SimpleNamespace(device_type=SimpleNamespace(name="CPU"), sequence_nr=-1, scope=0)
    return SimpleNamespace(**vars(kind), name=name, time_range=spans, kernels=own, cpu_parent=parent)


def test_kernels_of_a_cuda_graph_are_told_by_their_names():
    graph = event(
        "## Call CompiledFxGraph fpmwm ##",
        *("_fake_quantize_dynamic", "_fake_quantize", "_row_codes", "_gradient_codes", "_transposed_codes"),
        *("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNN", "sm90_xmma_gemm_bf16bf16_bf16f32", "triton_tem_fused_mm_3"),
        *("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        *("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "triton_poi_fused_mm_silu_view_7"),
        "Memcpy DtoD (Device -> Device)",
    )
    spent = attribution.attribute([graph], on_gpu=True)
    expected = {"fake quantization": 5, "matrix products": 3, "attention": 2, "fused by the compiler": 3}
    assert {category: own.calls for category, own in spent.items() if own.calls} == expected


def test_what_surrounds_a_kernel_says_more_than_its_name():
    """A product in an operator of ours is for fake quantization, and one of the optimizer's for that."""
    outer = event("optimizer")
    events = [outer, event("aten::mm", "sm90_xmma_gemm", parent=outer), event("qat::quantize", "sm90_xmma_gemm")]
    spent = attribution.attribute(events, on_gpu=True)
    assert spent["optimizer"].calls == spent["fake quantization"].calls == 1
    assert "fused by the compiler" not in spent


def test_every_kernel_that_steps_launch_has_a_name_that_tells():
    files = [path.read_text() for path in (Path(__file__).parents[2] / "qat" / "kernels").glob("**/*.py")]
    names = {name for text in files for name in re.findall(r"\bLaunch\(\s*(_\w+)", text)}
    assert len(names) > 8
    found = {name: attribution.attribute([event("cudaGraphLaunch", name)], on_gpu=True) for name in names}
    told = {name: {category for category, own in spent.items() if own.calls} for name, spent in found.items()}
    assert all(categories in ({"fake quantization"}, {"loss"}) for categories in told.values())


def test_notes_say_what_cannot_be_told_apart():
    blocks = SimpleNamespace(backend="inductor", cuda_graphs=True)
    fused, graphs = notes(blocks)
    assert "is not known" in fused
    assert "by their names alone" in graphs
    assert notes(SimpleNamespace(backend="aot_eager", cuda_graphs=False)) == notes(None) == []


def test_a_model_in_full_precision_quantizes_nothing(tmp_path):
    _, times, _ = profiled(tmp_path, qat.Scheme())
    assert times["fake quantization"]["ms"] == times["fake quantization"]["calls"] == 0
    assert times["matrix products"]["ms"] > 0


def test_nothing_is_counted_twice_or_lost():
    """The categories together are what torch itself sums up, and products are where they belong."""
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=W4, input=TOKEN8)).train()
    ids = torch.randint(0, 96, (2, 16))
    with profile() as recorded:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    spent = attribution.attribute(recorded.events(), on_gpu=False)
    whole = sum(average.self_cpu_time_total for average in recorded.key_averages())
    assert sum(own.microseconds for own in spent.values()) == pytest.approx(whole, rel=0.05)
    assert spent["optimizer"].calls == spent["data and idle"].calls == 0


def test_the_backward_pass_belongs_to_what_the_forward_pass_was_for():
    logits = torch.randn(256, 512, requires_grad=True)
    with profile() as recorded:
        with torch.profiler.record_function("fake quantization"):
            scaled = logits.exp2()
        F.cross_entropy(scaled, torch.zeros(256, dtype=torch.long)).backward()
    spent = attribution.attribute(recorded.events(), on_gpu=False)
    names = {category: own.calls for category, own in spent.items() if own.calls}
    assert names.keys() >= {"fake quantization", "loss"}
    assert spent["fake quantization"].calls > 2  # exp2, and what its backward pass multiplies


def test_memory_is_that_of_its_owners(tmp_path):
    found, _, _ = profiled(tmp_path, qat.Scheme(weight=W4))
    mib = {row["what"]: row["mib"] for row in found["memory"]}
    model = qat.prepare(tiny_llama(hidden_size=256, intermediate_size=1024), qat.Scheme(weight=W4))
    learned = {id(p) for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters()}
    sizes = [4 * p.numel() / 2**20 for p in model.parameters() if id(p) not in learned]
    assert mib["parameters"] == pytest.approx(sum(sizes))
    assert mib["gradients"] == pytest.approx(mib["parameters"] + mib["quantizers"])
    assert mib["optimizer state"] == pytest.approx(2 * mib["gradients"], rel=1e-3)
    assert mib["activations"] > max(sizes) / 4  # the codes of every layer


def test_activations_grow_with_the_batch(tmp_path):
    def peak(rows):
        x, weight = torch.randn(rows, 256), torch.randn(256, 256, requires_grad=True)
        with profile(profile_memory=True) as recorded:
            (x @ weight).relu().sum().backward()
        return attribution.peak_allocated(recorded.profiler.kineto_results.events())

    assert 2 * 4096 * 256 * 4 <= peak(4096) <= 5 * 4096 * 256 * 4
    assert peak(4096) > 2 * peak(1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps starts at 1"),
        ({"steps": 1, "warmup": -1}, "warmup at 0"),
        ({"steps": 3, "warmup": 2}, "records steps 3 to 5, and 4 are left"),
    ],
)
def test_steps_that_never_come_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, CausalLMModule(tiny_llama(), torch.optim.AdamW), Profile(str(tmp_path), **options))
