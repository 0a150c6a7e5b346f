"""Training stops at what is no number, without waiting for a GPU in every step."""

import math
import traceback
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.callbacks import LastCheckpoint, ProgressBar
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.finite import FiniteWatch, skip_unless_finite
from qat.errors import InputError
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import fit


class Late(pl.Callback):
    """Looks at values when the next one comes, as on a GPU; the gradient of one step is no number."""

    def __init__(self, broken_step=None):
        self.broken_step = broken_step

    def on_train_start(self, trainer, module):
        module.watch = FiniteWatch(late=True)

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.broken_step:
            module.model.lm_head.weight.grad.fill_(math.nan)


def test_a_value_is_looked_at_when_the_next_one_comes():
    watch = FiniteWatch(late=True)
    watch.see(torch.tensor(math.inf), lambda: "the first")
    with pytest.raises(InputError, match="the first"):
        watch.see(torch.tensor(1.0), lambda: "the second")
    watch.see(torch.tensor(1.0), lambda: "the third")
    watch.look()
    with pytest.raises(InputError, match="the fourth"):
        FiniteWatch(late=False).see(torch.tensor(math.nan), lambda: "the fourth")


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_found_late_reaches_no_checkpoint(tmp_path, fused):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3, fused=fused))
    last = LastCheckpoint(str(tmp_path), every_n_steps=1)
    with pytest.raises(InputError, match=r"gradients became nan at step 2|no longer finite after step 3"):
        fit(tmp_path, module, Late(2), last)
    assert torch.load(last.path, weights_only=True)["global_step"] == 2
    assert bool(torch.isfinite(module.model.lm_head.weight).all()) == fused


def test_the_last_step_is_looked_at(tmp_path):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3, fused=True))
    with pytest.raises(InputError, match="gradients became nan at step 3"):
        fit(tmp_path, module, Late(3), enable_checkpointing=False)


def test_steps_read_nothing_from_the_device(tmp_path):
    """But what the watch copied; logging has its own interval, and transformers looks whether a batch is packed."""

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten._local_scalar_dense.default:
                readers = {Path(frame.filename).name for frame in traceback.extract_stack()}
                found.append(readers & {"finite.py", "masking_utils.py"})
            return operator(*args, **(kwargs or {}))

    class Watched(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            self.reads = Reads()
            self.reads.__enter__()

        def on_train_batch_end(self, trainer, *args):
            self.reads.__exit__(None, None, None)

    found = []
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3, fused=True))
    fit(tmp_path, module, Late(), Watched(), ProgressBar(), enable_progress_bar=True, log_every_n_steps=100)
    assert 4 < len(found) <= 4 * 3
    assert all(found)


@pytest.mark.gpu
def test_a_gpu_is_asked_later_and_skips_the_step_itself():
    watch, weight = FiniteWatch(late=True), torch.nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.full_like(weight, math.nan)
    norm = weight.grad.norm()
    watch.see(norm, lambda: "no number")
    skip_unless_finite(optimizer, norm)
    optimizer.step()
    assert weight.eq(1).all()
    with pytest.raises(InputError, match="no number"):
        watch.look()
