"""Training dynamics from the command line: whole runs of a tiny model."""

import json

import pytest
import torch

import qat
from qat.nn import PackedLinear
from tests.lightning_modules.test_cli import LONG, forks, shell, wait_for, weights  # noqa: F401

TOGETHER = [
    *("callbacks.freezing.threshold=0.05", "callbacks.freezing.momentum=0.2", "callbacks.dampening.strength=1.0"),
    *("callbacks.precision.bits={0:8,6:5,12:3}", "callbacks.average.decay=0.9", "callbacks.average.start_step=12"),
    *("trainer.gradient_clip_val=null", "module.layer_clip={*_quantizer:0.01,*:1.0}", "optimizer.lr=3e-3"),
]


def test_all_of_it_killed_and_resumed_ends_with_the_same_bits(shell):  # noqa: F811
    shell.run(*LONG, *TOGETHER, "hydra.run.dir=whole", forks=True)
    process = shell.start(*shell.options, *LONG, *TOGETHER, "hydra.run.dir=killed")
    wait_for(shell.folder / "killed" / "checkpoints" / "last.ckpt", process)
    process.kill()
    process.wait()
    shell.run("resume=killed", defaults=False)
    whole, resumed = weights(shell.folder / "whole"), weights(shell.folder / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert shell.rows("whole") == shell.rows("killed")
    assert shell.rows("whole")["converted, saved, loaded"]["bits_per_weight"] == 3.5
    packed = {m.weight.format.bits for m in qat.load(shell.folder / "whole" / "native").modules() if is_packed(m)}
    assert packed == {3}


def is_packed(module):
    return isinstance(module, PackedLinear)


@pytest.mark.usefixtures("forks")
def test_weights_that_keep_more_bits_ship_with_them(shell):  # noqa: F811
    signal = ["callbacks.precision.bits={0:8,2:3}", "callbacks.precision.sqnr=99", "callbacks.precision.end_step=4"]
    output = shell.run("trainer.max_steps=6", *signal, "hydra.run.dir=run")
    assert "the same logits as the trained model" in output
    described = json.loads((shell.folder / "run" / "native" / "quant_config.json").read_text())["layers"]
    assert {weight["format"] for layer in described.values() for weight in layer["weights"].values()} == {"int8"}
    assert shell.rows("run")["converted, saved, loaded"]["bits_per_weight"] == 8.5


@pytest.mark.usefixtures("forks")
def test_a_schedule_that_ends_elsewhere_is_refused(shell):  # noqa: F811
    error = shell.fails("trainer.max_steps=6", "callbacks.precision.bits={0:8,2:4}", "hydra.run.dir=run")
    assert "ends at 4 bits, and the scheme ships 3" in error
