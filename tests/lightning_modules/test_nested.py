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


def trained(tmp_path, turns, **options):
    module = CausalLMModule(qat.prepare(tiny_llama(), qat.Scheme(weight=NESTED)), partial(torch.optim.AdamW, lr=1e-3))
    seen = Seen()
    fit(tmp_path, module, NestedBits(turns), seen, max_epochs=4, **options)
    return seen


def test_widths_take_turns_and_between_steps_is_the_one_that_ships(tmp_path):
    seen = trained(tmp_path, None)
    assert seen.within == [{8}, {4}, {2}, {8}]
    assert seen.between == [{8}] * 4
    assert trained(tmp_path, [2, 2, 8, 4]).within == [{2}, {2}, {8}, {4}]


def test_a_turn_lasts_for_an_optimizer_step(tmp_path):
    seen = trained(tmp_path, None, accumulate_grad_batches=2, max_steps=2)
    assert seen.within == [{8}, {8}, {4}, {4}]


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
