from functools import partial

import pytest
import pytorch_lightning as pl
import torch

import qat
from lightning_modules.callbacks import PruneSchedule
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer
from qat.transforms import magnitude, quant_layers
from qat.transforms.masks import sparsity
from tests.conftest import tiny_llama
from tests.lightning_modules.test_codebooks import Watch
from tests.lightning_modules.test_module import Batches, fit

LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
WEIGHTS = {"full precision": None, "int4": LSQ4, "kmeans3": partial(KMeansQuantizer, bits=3)}


def module(weight=LSQ4):
    torch.manual_seed(0)
    model = tiny_llama() if weight is None else qat.prepare(tiny_llama(), qat.Scheme(weight=weight))
    return CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-2))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_zeros_come_fast_then_slowly_and_stay(weight, pattern, tmp_path):
    own, watch = module(weight), Watch(lambda pl_module: sparsity(pl_module))
    schedule = PruneSchedule(0.5, pattern, begin_step=1, end_step=5, every_n_steps=1)
    fit(tmp_path, own, schedule, watch, max_steps=8)
    expected = [0, 0, *(0.5 * (1 - (1 - i / 4) ** 3) for i in (1, 2, 3)), 0.5, 0.5, 0.5]
    assert watch.seen == pytest.approx(expected, abs=1e-3)
    assert watch.seen[-1] == 0.5
    for _, layer in quant_layers(own.model):
        used, mask = layer.weight_quantizer(layer.weight), layer.weight_quantizer.mask
        assert (used[~mask] == 0).all()
        if pattern == "2:4":
            assert (mask.view(-1, 4).sum(1) == 2).all()
    qat.convert(own.model)


def test_pruned_weights_return_only_if_they_learn_on(tmp_path):
    for dense in (False, True):
        watch = Watch(lambda m: [q.weight_quantizer.mask.clone() for _, q in quant_layers(m)])
        schedule = PruneSchedule(0.5, begin_step=0, end_step=6, every_n_steps=1, dense_gradient=dense)
        own = CausalLMModule(
            magnitude(qat.prepare(tiny_llama(), qat.Scheme(weight=LSQ4)), sparsity=0.1),
            partial(torch.optim.AdamW, lr=3e-2),
        )
        fit(tmp_path, own, schedule, watch, max_steps=8)
        returned = any((after & ~before).any() for before, after in zip(watch.seen[0], watch.seen[-1], strict=True))
        assert returned == dense


class KeepAt(pl.Callback):
    """Writes a checkpoint after an optimizer step, and goes on."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_a_resumed_run_ends_with_the_same_bits(weight, tmp_path):
    """From the middle of the schedule, and where a transform has put the masks there, which a new run has not."""
    for schedule in (partial(PruneSchedule, 0.5, end_step=6, every_n_steps=2), PruneSchedule):
        whole, again = module(weight), module(weight)
        if schedule is PruneSchedule:
            magnitude(whole.model)
        path = tmp_path / f"{schedule is PruneSchedule}.ckpt"
        fit(tmp_path, whole, schedule(), KeepAt(4, path), max_steps=8)
        trainer = pl.Trainer(
            max_steps=8, accelerator="cpu", logger=False, callbacks=[schedule()], enable_checkpointing=False
        )
        trainer.fit(again, datamodule=Batches(), ckpt_path=path, weights_only=True)
        assert sparsity(again) == 0.5
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_a_layer_that_is_excluded_stays_dense(tmp_path):
    own = module()
    fit(tmp_path, own, PruneSchedule(0.5, end_step=2, exclude="*.down_proj"), max_steps=4)
    for name, layer in quant_layers(own.model):
        assert (layer.weight_quantizer.mask is None) == name.endswith("down_proj")


def test_without_a_sparsity_nothing_is_pruned(tmp_path):
    own = module()
    fit(tmp_path, own, PruneSchedule(), max_steps=2)
    assert not any("mask" in name for name in own.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5, "every_n_steps": 0}, "every_n_steps starts at 1"),
        ({"sparsity": 0.5, "begin_step": 5, "end_step": 2}, "end_step comes after it"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "set sparsity=0.5"),
        ({"sparsity": 1.5}, "set it to 0.5"),
        ({"sparsity": 0.5, "end_step": 4}, "the training to 4: nothing would train on what ships"),
        ({"sparsity": 0.5, "exclude": "*.nothing"}, "matches no layer"),
    ],
    ids=["every", "order", "pattern", "share", "late", "exclude"],
)
def test_bad_options_name_the_mend(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, module(), PruneSchedule(**options), max_steps=4)


def test_a_grid_without_zero_is_refused(tmp_path):
    stretched = partial(LSQQuantizer, bits=2, grid="stretched")
    with pytest.raises(InputError, match=r"layers\.0.*has no zero there: take quantizer@scheme.weight=lsq"):
        fit(tmp_path, module(stretched), PruneSchedule(0.5), max_steps=4)
