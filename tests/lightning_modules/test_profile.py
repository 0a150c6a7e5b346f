"""The table of a step's time and memory adds up, and names things rightly."""

import json
import time
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.profiler import profile

import qat
from lightning_modules import attribution
from lightning_modules.callbacks import Profile
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.quantizers import LSQQuantizer, Quantizer
from tests.conftest import tiny_llama
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
    assert list(times) == list(attribution.CATEGORIES)
    assert sum(row["ms"] for row in times.values()) == pytest.approx(found["ms_a_step"])
    assert sum(row["share"] for row in times.values()) == pytest.approx(1)
    # Within the clock of the steps themselves; torch takes its time to begin and to end recording.
    assert found["ms_a_step"] < 1e3 * (starts[3] - starts[1]) / 2
    assert all(row["ms"] > 0 and row["calls"] > 0 for row in times.values())
    assert times["fake quantization"]["share"] > 0.05


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
