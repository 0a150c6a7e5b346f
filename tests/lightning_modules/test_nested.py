"""Training and serving one set of codes at several widths."""

import json
from functools import partial

import pytest
import torch
from pytorch_lightning import Callback

import qat
from lightning_modules import evaluate as eval_command
from lightning_modules.callbacks import NestedBits
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.distillation import Distillation
from qat.errors import InputError
from qat.quantizers import NestedQuantizer
from tests.conftest import tiny_llama
from tests.lightning_modules.test_cli import forks, shell  # noqa: F401
from tests.lightning_modules.test_evaluation import composed
from tests.lightning_modules.test_module import fit

NESTED = partial(NestedQuantizer, granularity="per_group_32")


class Seen(Callback):
    """The width of every step, and that between steps."""

    def __init__(self):
        self.within, self.between = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.within.append({q.format.bits for q in pl_module.modules() if isinstance(q, NestedQuantizer)})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.between.append({q.format.bits for q in pl_module.modules() if isinstance(q, NestedQuantizer)})


def nested_module(**options):
    model = qat.prepare(tiny_llama(), qat.Scheme(weight=NESTED))
    return CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), **options)


def trained(tmp_path, turns, **options):
    seen = Seen()
    fit(tmp_path, nested_module(), NestedBits(turns), seen, max_epochs=4, **options)
    return seen


def test_widths_take_turns_and_between_steps_is_the_one_that_ships(tmp_path):
    seen = trained(tmp_path, None)
    assert seen.within == [{8}, {4}, {2}, {8}]
    assert seen.between == [{8}] * 4
    assert trained(tmp_path, [2, 2, 8, 4]).within == [{2}, {2}, {8}, {4}]


def test_a_turn_lasts_for_an_optimizer_step(tmp_path):
    seen = trained(tmp_path, None, accumulate_grad_batches=2, max_steps=2)
    assert seen.within == [{8}, {8}, {4}, {4}]


class Gradients(Callback):
    """Of the first step; and before its own forward pass, those of each width alone."""

    def __init__(self):
        self.alone, self.summed = {}, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for bits in () if self.alone else (8, 4, 2):
            for quantizer in _nested_of(pl_module):
                quantizer.at(bits)
            pl_module.model(**batch).loss.backward()
            self.alone[bits] = _gradients(pl_module)
            pl_module.zero_grad()

    def on_after_backward(self, trainer, pl_module):
        self.summed = self.summed or _gradients(pl_module)


def _nested_of(module):
    return [own for own in module.modules() if isinstance(own, NestedQuantizer)]


def _gradients(module):
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_the_loss_of_a_step_is_the_weighted_sum_over_widths(tmp_path):
    weights, seen, gradients = {8: 1.0, 4: 0.5, 2: 2.0}, Seen(), Gradients()
    module = nested_module()
    fit(tmp_path, module, NestedBits(weights=weights), gradients, seen, max_epochs=1)
    assert len(gradients.summed) == len(gradients.alone[8])
    for index, found in enumerate(gradients.summed):
        expected = sum(weight * gradients.alone[bits][index] for bits, weight in weights.items())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert seen.within == seen.between == [{8}] * 2
    loss = torch.ones(())
    assert module.passes(lambda: loss) is loss  # nothing of it outlives the fit


def test_the_teacher_reads_a_batch_once_for_all_widths(tmp_path):
    def reads(nested):
        distillation, model, found = Distillation(), tiny_llama(), []
        distillation.make_teacher(model)
        distillation.teacher.model.layers[0].register_forward_pre_hook(lambda *_: found.append(1))
        model = qat.prepare(model, qat.Scheme(weight=NESTED))
        module = CausalLMModule(model, partial(torch.optim.AdamW, lr=1e-3), distill=distillation)
        fit(tmp_path, module, nested, max_steps=2)
        return len(found)

    assert reads(NestedBits(weights={8: 1, 4: 1, 2: 1})) == reads(NestedBits())


def test_a_sum_of_widths_is_refused_where_one_is_remembered(tmp_path):
    with pytest.raises(InputError, match=r"set module.gradient_checkpointing=false, or callbacks.nested.turns"):
        fit(tmp_path, nested_module(gradient_checkpointing=True), NestedBits(weights={8: 1, 4: 1, 2: 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": [8, 4, 2], "weights": {8: 1}}, "two ways to train: set one of them to null"),
        ({"weights": {8: 1, 4: 0}}, "weights has 0 for 4 bits; it is positive"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        NestedBits(**options)


def test_weights_of_other_widths_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"weights is \[8, 4\], and the codes nest \[8, 4, 2\]: name each"):
        fit(tmp_path, nested_module(), NestedBits(weights={8: 1, 4: 1}))


@pytest.mark.parametrize("turns", [[3], [8, 4], [8, 4, 2, 3]])
def test_turns_of_other_widths_are_refused(tmp_path, turns):
    with pytest.raises(InputError, match=r"turns is .* codes nest \[8, 4, 2\]: name each"):
        trained(tmp_path, turns)


def test_turns_without_nested_codes_are_refused(tmp_path):
    module = CausalLMModule(tiny_llama(), partial(torch.optim.AdamW, lr=1e-3))
    with pytest.raises(InputError, match=r"the scheme has none: set it to null, or quantizer@scheme.weight=nested"):
        fit(tmp_path, module, NestedBits([8, 4]))


@pytest.mark.usefixtures("forks")
def test_one_run_ships_what_serves_at_every_width(shell):  # noqa: F811
    words = ["quantizer@scheme.weight=nested", "scheme.weight.bits=8", "trainer.max_steps=3", "hydra.run.dir=run"]
    shell.run(*words, "scheme.weight.granularity=per_group_32")
    rows = shell.rows("run")
    assert list(rows)[-3:] == ["loaded at 4 bits", "loaded at 2 bits", "converted, saved, loaded"]
    four, two, eight = (rows[name] for name in list(rows)[-3:])
    assert four["bits_per_weight"] == eight["bits_per_weight"] - 4 == two["bits_per_weight"] + 2
    assert two["mib"] < four["mib"] < eight["mib"]
    assert len({row["perplexity"] for row in (four, two, eight)}) == 3

    folder = shell.folder / "run" / "native"
    text = [word for word in shell.options if word.startswith(("model", "data.path", "data="))]
    cfg = composed("evaluate", shell.folder, *text, "window=32", f"artifact={folder}", "bits=[4,2]", "stride=32")
    eval_command._run(cfg)
    rows = json.loads((shell.folder / "eval.json").read_text())["rows"]
    assert [row["model"] for row in rows[1:]] == [f"{folder}, 4 bits", f"{folder}, 2 bits"]
    assert [row["bits_per_weight"] for row in rows[1:]] == [four["bits_per_weight"], two["bits_per_weight"]]
    assert rows[1]["kl"] < rows[2]["kl"]
    with pytest.raises(InputError, match="bits is four"):
        eval_command._run(composed("evaluate", shell.folder, *text, f"artifact={folder}", "bits=four"))
