"""Optimizers of bitsandbytes: who gets 8 bits, and that a run goes on with the same bits."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate

import qat
from lightning_modules.callbacks import LastCheckpoint
from lightning_modules.causal_lm import CausalLMModule
from qat.quantizers import LSQQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import fit
from tests.test_configs import composed

NAMES = ["adamw8bit", "paged_adamw", "paged_adamw8bit"]
BITS = {"adamw8bit": torch.uint8, "paged_adamw": torch.float32, "paged_adamw8bit": torch.uint8}


def module(optimizer):
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=128, intermediate_size=512)
    # Groups of 8: a layer has up to 8192 scales, more than what bitsandbytes leaves in 32 bits by itself.
    model = qat.prepare(model, qat.Scheme(weight=partial(LSQQuantizer, bits=4, granularity="per_group_8")))
    return CausalLMModule(model, optimizer, quantizer_lr=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_what_quantizers_learn_keeps_32_bits(name, tmp_path):
    own = module(instantiate(composed(tmp_path, f"optimizer={name}").optimizer))
    fit(tmp_path, own)
    optimizer = own.optimizers(use_pl_optimizer=False)
    groups = {group["name"]: [optimizer.state[p] for p in group["params"]] for group in optimizer.param_groups}
    assert {state["state1"].dtype for state in groups["matrices"]} == {BITS[name]}
    assert {state["state2"].dtype for state in groups["quantizers"]} == {torch.float32}
    assert max(state["state1"].numel() for state in groups["quantizers"]) > 4096


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    factory = instantiate(composed(tmp_path, f"optimizer={name}").optimizer)
    whole, first, second = (module(factory) for _ in range(3))
    fit(tmp_path, whole)
    last = LastCheckpoint(str(tmp_path), every_n_steps=2)
    fit(tmp_path, first, last, max_steps=2)
    fit(tmp_path, second, ckpt_path=last.path)
    expected, found = whole.state_dict(), second.state_dict()
    different = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    assert [key for key in different if not torch.equal(found[key], expected[key])] == []


def test_8_bits_lead_to_the_same_loss(tmp_path):
    losses = {}
    for name in ("adamw", "adamw8bit"):
        own = module(instantiate(composed(tmp_path, f"optimizer={name}", "optimizer.lr=1e-3").optimizer))
        rows = fit(tmp_path / name, own, max_steps=20, max_epochs=-1, log_every_n_steps=1)
        losses[name] = [row["train/loss"] for row in rows.values()]
    assert losses["adamw"][-1] < 0.8 * losses["adamw"][0]
    assert losses["adamw8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.05)
