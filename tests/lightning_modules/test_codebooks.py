from functools import partial

import pytest
import pytorch_lightning as pl
import torch

import qat
from lightning_modules.callbacks import CodebookRefresh, SoftKMeans
from lightning_modules.callbacks.codebooks import refresh
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer
from qat.transforms import quant_layers
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import fit

KMEANS = qat.Scheme(weight=partial(KMeansQuantizer, bits=3))


def module():
    return CausalLMModule(qat.prepare(tiny_llama(), KMEANS), partial(torch.optim.AdamW, lr=1e-2))


def quantizers(model):
    return [layer.weight_quantizer for _, layer in quant_layers(model)]


class Watch(pl.Callback):
    """Keeps what `look` says after every batch."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(self.look(pl_module))


def test_codebooks_are_refreshed_after_every_second_step(tmp_path):
    """The learning rate of zero leaves refreshing as the only thing that moves a codebook."""
    own = CausalLMModule(qat.prepare(tiny_llama(), KMEANS), partial(torch.optim.SGD, lr=0.0))
    with torch.no_grad():
        for quantizer in quantizers(own):
            quantizer.codebook += 0.05
    watch = Watch(lambda pl_module: quantizers(pl_module)[0].codebook.detach().clone())
    fit(tmp_path, own, CodebookRefresh(every_n_steps=2), watch)
    changed = [not torch.equal(a, b) for a, b in zip(watch.seen, watch.seen[1:], strict=False)]
    assert changed == [True, False, True]


def test_accumulated_batches_refresh_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(KMeansQuantizer, "refresh", lambda self, weight: calls.append(id(self)))
    own = module()
    fit(tmp_path, own, CodebookRefresh(every_n_steps=1), max_steps=2, accumulate_grad_batches=2)
    assert len(calls) == 2 * len(quantizers(own))


def test_without_a_number_nothing_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(KMeansQuantizer, "refresh", lambda self, weight: pytest.fail("refreshed"))
    fit(tmp_path, module(), CodebookRefresh(), max_steps=2)


def test_shared_weights_are_refreshed_once(monkeypatch):
    first, second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    second.weight = first.weight
    model = qat.prepare(torch.nn.Sequential(first, second), KMEANS)
    calls = []
    monkeypatch.setattr(KMeansQuantizer, "refresh", lambda self, weight: calls.append(weight))
    refresh(model)
    assert len(calls) == 1


def test_the_assignment_cools_and_ends_hard(tmp_path):
    watch = Watch(lambda pl_module: quantizers(pl_module)[0].temperature)
    own = module()
    fit(tmp_path, own, SoftKMeans(start=1e-1, end=1e-3, steps=3), watch, max_steps=4)
    assert watch.seen[:3] == pytest.approx([1e-1, 1e-2, 1e-3])
    assert watch.seen[3] is None
    assert all(q.temperature is None for q in quantizers(own))


def test_a_run_that_would_end_soft_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"callbacks.soft ends after 2 steps, the training after 2: nothing would"):
        fit(tmp_path, module(), SoftKMeans(steps=2), max_steps=2)


@pytest.mark.parametrize("callback", [SoftKMeans(steps=1), CodebookRefresh(every_n_steps=1)], ids=["soft", "refresh"])
def test_without_codebooks_the_options_are_refused(callback, tmp_path):
    integers = qat.prepare(tiny_llama(), qat.Scheme(weight=partial(LSQQuantizer, bits=4)))
    with pytest.raises(InputError, match="is for k-means codebooks, and no weight has one"):
        fit(tmp_path, CausalLMModule(integers, partial(torch.optim.AdamW, lr=1e-2)), callback, max_steps=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodebookRefresh(every_n_steps=0), "callbacks.refresh.every_n_steps is 0; it starts at 1, null is off"),
        (lambda: SoftKMeans(steps=0), "callbacks.soft.steps is 0"),
        (lambda: SoftKMeans(start=1e-4, end=1e-2, steps=3), "cools from start to end"),
    ],
    ids=["refresh", "steps", "order"],
)
def test_bad_options_name_the_mend(make, message):
    with pytest.raises(InputError, match=message):
        make()
