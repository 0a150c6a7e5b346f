from functools import partial

import pytest
import pytorch_lightning as pl
import torch

import qat
from lightning_modules.callbacks import LastCheckpoint, PruneSchedule, WeightEMA
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer
from qat.transforms import magnitude
from qat.transforms.masks import sparsity
from tests.conftest import tiny_llama
from tests.lightning_modules.test_module import Batches, fit
from tests.lightning_modules.test_prune_schedule import KeepAt

LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
WEIGHTS = {"full precision": None, "lsq+": partial(LSQQuantizer, symmetric=False), "kmeans3": partial(KMeansQuantizer)}
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def module(weight=LSQ4, **options):
    torch.manual_seed(0)
    model = tiny_llama() if weight is None else qat.prepare(tiny_llama(), qat.Scheme(weight=weight))
    return CausalLMModule(model, ADAMW, **options)


class Track(pl.Callback):
    """Keeps all Parameters after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_what_ships_is_the_average(weight, tmp_path):
    own, track = module(weight), Track()
    fit(tmp_path, own, track, WeightEMA(decay=0.8, every_n_steps=2, start_step=1), max_steps=8)
    expected = track.seen[1]
    for step in (3, 5, 7):
        expected = {name: 0.8 * value + 0.2 * track.seen[step][name] for name, value in expected.items()}
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(p, track.seen[-1][name]) for name, p in own.named_parameters())
    if weight is not None:
        ids = torch.arange(8)[None]
        own.eval()
        logits = own.model(input_ids=ids).logits
        assert torch.equal(qat.convert(own.model)(input_ids=ids).logits, logits)


class Evaluated(Batches):
    val_dataloader = Batches.train_dataloader


def test_evaluation_sees_the_average_and_training_does_not(tmp_path):
    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            self.evaluated = pl_module.model.lm_head.weight.detach().clone()

        def on_train_batch_start(self, trainer, pl_module, *args):
            self.trained = pl_module.model.lm_head.weight.detach().clone()

    own, look, track = module(), Look(), Track()
    trainer = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        callbacks=[track, WeightEMA(decay=0.5), look],
        enable_progress_bar=False,
        check_val_every_n_epoch=1,
    )
    trainer.fit(own, datamodule=Evaluated())
    name = "model.lm_head.weight"
    name = name if name in track.seen[0] else "model.model.embed_tokens.weight"
    expected = track.seen[0][name]
    for seen in track.seen[1:]:
        expected = (expected + seen[name]) / 2
    torch.testing.assert_close(look.evaluated, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(look.trained, track.seen[2][name])


def resumed(again, path, *callbacks):
    trainer = pl.Trainer(
        max_steps=8, accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=False
    )
    trainer.fit(again, datamodule=Batches(), ckpt_path=path, weights_only=True)


def same_bits(first, second):
    state = second.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("pruned", ["no", "schedule", "transform"])
def test_a_resumed_run_ends_with_the_same_bits(weight, pruned, tmp_path):
    def callbacks():
        prune = [PruneSchedule(0.5, end_step=6, every_n_steps=2)] if pruned == "schedule" else []
        return [*prune, WeightEMA(decay=0.8)]

    whole, again, path = module(weight), module(weight), tmp_path / "middle.ckpt"
    if pruned == "transform":
        magnitude(whole.model)
    fit(tmp_path, whole, *callbacks(), KeepAt(4, path), max_steps=8)
    resumed(again, path, *callbacks())
    assert same_bits(whole, again)
    assert sparsity(again.model) == (0 if pruned == "no" else 0.5)


def test_a_finished_run_is_taken_up_from_its_last_checkpoint(tmp_path):
    """Which holds the weights beside the average, so that the average ships then too, and training can go on."""
    whole, again = module(), module()
    last = LastCheckpoint(str(tmp_path))
    track = Track()
    fit(tmp_path, whole, WeightEMA(decay=0.8), track, last, max_steps=8)
    checkpoint = torch.load(last.path, weights_only=True)
    assert all(torch.equal(checkpoint["current_model_state"][name], p) for name, p in track.seen[-1].items())
    resumed(again, last.path, WeightEMA(decay=0.8))
    assert same_bits(whole, again)


def test_evaluation_after_training_leaves_another_model_alone(tmp_path):
    """The pipeline puts what it saved and loaded in the model's place, which has other Parameters."""
    own, average = module(), WeightEMA(decay=0.8)
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, callbacks=[average], enable_checkpointing=False)
    trainer.fit(own, datamodule=Evaluated())
    own.model = qat.convert(own.model)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    trainer.validate(own, datamodule=Evaluated(), verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def test_masks_are_those_of_the_last_step(tmp_path):
    """Not of the last update of the average, before which less was pruned."""
    own = module()
    schedule = PruneSchedule(0.5, begin_step=0, end_step=6, every_n_steps=1)
    fit(tmp_path, own, schedule, WeightEMA(decay=0.8, every_n_steps=5), max_steps=8, enable_checkpointing=False)
    assert sparsity(own.model) == 0.5


def test_compiled_blocks_train_the_same_average(tmp_path):
    eager, compiled = module(), module(compile="aot_eager")
    for own in (eager, compiled):
        fit(tmp_path, own, WeightEMA(decay=0.8), max_steps=3)
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(parameter, compiled.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_a_teacher_is_not_copied(tmp_path):
    class Teacher:
        def __deepcopy__(self, memo):
            pytest.fail("copied")

    own = module()
    own.distillation = Teacher()
    average = WeightEMA(decay=0.9)
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    average.setup(trainer, own, "fit")
    assert isinstance(own.distillation, Teacher)
    assert average._average_model.module.distillation is None


def test_off_means_off(tmp_path):
    plain, own, path = module(), module(), tmp_path / "plain.ckpt"
    fit(tmp_path, plain, max_steps=3)
    fit(tmp_path, own, WeightEMA(), KeepAt(2, path), max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), own.parameters(), strict=True))
    assert "current_model_state" not in torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (WeightEMA(), WeightEMA(0.9), "holds no average of weights: set callbacks.average.decay=null"),
        (WeightEMA(0.9), WeightEMA(), "holds an average of weights, and this run none: set callbacks.average.decay"),
    ],
    ids=["begun", "left"],
)
def test_a_resumed_run_has_an_average_as_before(before, after, message, tmp_path):
    path = tmp_path / "middle.ckpt"
    fit(tmp_path, module(), before, KeepAt(2, path), max_steps=2)
    with pytest.raises(InputError, match=message):
        resumed(module(), path, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay is 1.0; it lies between 0 and 1"),
        ({"decay": 0.9, "every_n_steps": 0}, "every_n_steps=0, which starts at 1"),
        ({"decay": 0.9, "start_step": 4}, "starts after step 4, the training ends after 4: lower its start_step"),
    ],
    ids=["decay", "every", "late"],
)
def test_bad_options_name_the_mend(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, module(), WeightEMA(**options), max_steps=4)


def test_weights_of_16_bits_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"in bfloat16, which loses small steps: set trainer.precision=bf16-mixed"):
        fit(tmp_path, module(None).bfloat16(), WeightEMA(0.9), max_steps=2)
