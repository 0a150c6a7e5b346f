from functools import partial

import pytest
import pytorch_lightning as pl
import torch

import qat
from lightning_modules.callbacks import OscillationDampening, OscillationFreezing
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.quantizers.oscillation import codes_of
from qat.transforms.layers import quantized_weights
from tests.conftest import tiny_llama
from tests.lightning_modules.test_codebooks import Watch
from tests.lightning_modules.test_module import Batches, fit
from tests.lightning_modules.test_prune_schedule import KeepAt
from tests.models import tiny_gpt_oss

LSQ3 = partial(LSQQuantizer, bits=3, granularity="per_group_32")
WEIGHTS = {"int3": LSQ3, "kmeans3": partial(KMeansQuantizer, bits=3)}
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
FREEZING = partial(OscillationFreezing, threshold=0.05, start_threshold=0.1, momentum=0.3)


def module(weight=LSQ3, optimizer=ADAMW, make=tiny_llama, **options):
    torch.manual_seed(0)
    return CausalLMModule(qat.prepare(make(), qat.Scheme(weight=weight)), optimizer, **options)


def all_codes(pl_module):
    return {w.label: codes_of(w.quantizer, w.matrix).clone() for w in quantized_weights(pl_module)}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_frozen_weights_hold_against_momentum_and_decay(weight, tmp_path):
    sgd = partial(torch.optim.SGD, lr=2.0, momentum=0.95, weight_decay=0.02)
    own, freezing = module(weight, sgd, quantizer_lr=1e-2), FREEZING()
    frozen = Watch(lambda m: {label: history.frozen.clone() for label, history in freezing._histories.items()})
    codes = Watch(all_codes)
    rows = fit(tmp_path, own, freezing, frozen, codes, max_steps=24, gradient_clip_val=1.0, log_every_n_steps=1)
    for before, now, then in zip(frozen.seen, codes.seen, codes.seen[1:], strict=False):
        for label, mask in before.items():
            assert torch.equal(now[label][mask], then[label][mask])
    moved = [
        (now[label] != then[label]).any()
        for now, then in zip(codes.seen, codes.seen[1:], strict=False)
        for label in now
    ]
    assert any(moved)
    shares = [row["train/frozen"] for row in rows.values()]
    count = sum(int(mask.sum()) for mask in frozen.seen[-1].values())
    assert shares[-1] == pytest.approx(count / sum(mask.numel() for mask in frozen.seen[-1].values()))
    assert 0 < shares[-1] < 1
    assert shares == sorted(shares)
    trained = {w.label: w.quantizer(w.matrix).detach() for w in quantized_weights(own)}
    qat.convert(own.model)
    for label, values in trained.items():
        assert torch.equal(own.get_submodule(label).dequantize(), values)


def test_accumulated_batches_are_one_step(tmp_path):
    """The codes that are counted are those after a step: twice the batches of two steps are two updates."""
    own, freezing = module(), OscillationFreezing(threshold=0.9, momentum=0.5)
    seen = Watch(lambda m: sum(float(h.frequency.sum()) for h in freezing._histories.values()))
    fit(tmp_path, own, freezing, seen, max_steps=6, accumulate_grad_batches=2)
    assert all(a == b for a, b in zip(seen.seen[1::2], seen.seen[2::2], strict=False))
    assert len(set(seen.seen)) > 2


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_a_resumed_run_ends_with_the_same_bits(weight, tmp_path):
    def callbacks():
        return OscillationDampening(strength=10.0), FREEZING()

    whole, again, path = module(weight), module(weight), tmp_path / "middle.ckpt"
    first, second = callbacks(), callbacks()
    fit(tmp_path, whole, *first, KeepAt(6, path), max_steps=10)
    trainer = pl.Trainer(
        max_steps=10, accelerator="cpu", logger=False, callbacks=list(second), enable_checkpointing=False
    )
    stored = torch.load(path, weights_only=True)["callbacks"]["OscillationFreezing"]
    assert any((state["direction"] == 2).any() for state in stored.values())
    trainer.fit(again, datamodule=Batches(), ckpt_path=path, weights_only=True)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    for label, history in first[1]._histories.items():
        for name in ("codes", "direction", "frequency", "mean"):
            assert torch.equal(getattr(history, name), getattr(second[1]._histories[label], name))


def test_freezing_costs_six_bytes_a_weight(tmp_path):
    freezing = FREEZING()
    fit(tmp_path, module(), freezing, max_steps=1)
    states = [history.state_dict() for history in freezing._histories.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == 6 * sum(state["codes"].numel() for state in states)


def distance(own):
    """Mean squared distance of the weights to their grid, relative to the squared scale."""
    found = []
    for weight in quantized_weights(own):
        step = weight.quantizer.granularity.view(weight.matrix - weight.quantizer(weight.matrix))
        scale = weight.quantizer.qparams(weight.matrix).for_view().scale
        found.append(((step / scale) ** 2).mean())
    return float(torch.stack(found).mean())


def test_dampening_draws_weights_to_their_grid(tmp_path):
    distances = {}
    for strength in (None, 100.0):
        own = module(optimizer=partial(torch.optim.AdamW, lr=1e-3))
        rows = fit(tmp_path, own, OscillationDampening(strength), max_steps=30, log_every_n_steps=1)
        distances[strength] = distance(own)
        added = [row["train/dampening"] for row in rows.values() if "train/dampening" in row]
        assert bool(added) == (strength is not None)
    assert distances[100.0] < 0.5 * distances[None]


class Gradients(pl.Callback):
    """Keeps what the last step's clipping is given."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt_oss], ids=["llama", "transposed experts"])
def test_dampening_adds_the_gradient_of_its_loss(make, tmp_path):
    """At the last step, when it has its full strength, against autograd through the regulariser."""
    found = {}
    for strength in (None, 3.0):
        own, grads = module(partial(LSQQuantizer, bits=8), partial(torch.optim.SGD, lr=0.0), make), Gradients()
        with torch.no_grad():
            for weight in quantized_weights(own):
                weight.quantizer.log_scale += 1  # nothing is beyond the grid
        rows = fit(tmp_path, own, OscillationDampening(strength), grads, max_steps=2, log_every_n_steps=1)
        found[strength] = grads.seen
    loss = torch.zeros(())
    for weight in quantized_weights(own):
        w = weight.layer.matrix(weight.layer, weight.name)
        loss = loss + 3.0 * (weight.quantizer(w).detach() - w).square().sum()
    own.zero_grad()
    loss.backward()
    assert rows[1]["train/dampening"] == pytest.approx(float(loss), rel=1e-4)
    assert any(parameter.grad is None for parameter in own.parameters())  # only weights learn from it
    for name, parameter in own.named_parameters():
        if name in found[None]:
            added = found[3.0][name] - found[None][name]
            expected = torch.zeros_like(added) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)


def test_the_strength_rises_along_half_a_cosine():
    dampening = OscillationDampening(2.0)
    dampening._steps = 5
    assert [dampening.strength_at(step) for step in range(6)] == pytest.approx(
        [0, 0.292893, 1, 1.707107, 2, 2], abs=1e-5
    )


def test_the_threshold_falls_along_half_a_cosine():
    freezing = OscillationFreezing(threshold=0.1, start_threshold=0.5)
    freezing._steps = 5
    expected = [0.5, 0.441421, 0.3, 0.158579, 0.1, 0.1]
    assert [freezing.threshold_at(step) for step in range(6)] == pytest.approx(expected, abs=1e-5)


def test_off_means_off(tmp_path):
    plain, own = module(), module()
    fit(tmp_path, plain, max_steps=3)
    freezing = OscillationFreezing()
    fit(tmp_path, own, OscillationDampening(), freezing, max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), own.parameters(), strict=True))
    assert freezing.state_dict() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OscillationDampening(strength=0.0), "strength is 0.0; it is positive"),
        (lambda: OscillationFreezing(threshold=0.1, start_threshold=0.05), "0 < threshold <= start_threshold < 1"),
        (lambda: OscillationFreezing(threshold=1.5), "0 < threshold <= start_threshold < 1"),
        (lambda: OscillationFreezing(threshold=0.1, momentum=1e-4), "between 0.001 and 1: set it to 0.01"),
    ],
    ids=["strength", "order", "share", "momentum"],
)
def test_bad_options_name_the_mend(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("callback", [OscillationDampening(1.0), OscillationFreezing(0.1)], ids=["damp", "freeze"])
def test_without_quantized_weights_the_options_are_refused(callback, tmp_path):
    with pytest.raises(InputError, match="is for quantized weights, and the scheme has none: choose scheme=w4"):
        fit(tmp_path, CausalLMModule(tiny_llama(), ADAMW), callback, max_steps=2)


def test_scales_that_follow_the_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"layers.0.*follow from the weights at every step"):
        fit(tmp_path, module(partial(MinMaxQuantizer, bits=4)), OscillationFreezing(0.1), max_steps=2)
