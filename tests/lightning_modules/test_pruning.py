"""Pruning from the command line: whole runs of a tiny model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import qat
from qat.nn import PackedLayer
from tests.lightning_modules.test_cli import LONG, forks, shell, wait_for, weights  # noqa: F401

STRUCTURED = ["prune=structured", "prune.structured.heads=0.5", "prune.structured.channels=0.25"]
STRUCTURED += ["prune.structured.blocks=0.5", "prune.structured.multiple_of=32"]


def without_scheme(shell):  # noqa: F811
    shell.options = [option for option in shell.options if not option.startswith("scheme")]


@pytest.mark.usefixtures("forks")
def test_quantized_training_with_zeros_ships_them(shell):  # noqa: F811
    output = shell.run("debug=fast", "transforms=sparsegpt", "transforms.sparsegpt.pattern='2:4'", "hydra.run.dir=run")
    assert "pruned: 50.0% of the weights that have a mask are zero" in output
    artifact = shell.folder / "run" / "native"
    assert 0.3 < json.loads((artifact / "quant_config.json").read_text())["density"] <= 0.5
    packed = [m for m in qat.load(artifact).modules() if isinstance(m, PackedLayer)]
    assert len(packed) == 14
    for layer in packed:
        assert ((layer.weight.dequantize().view(-1, 4) != 0).sum(1) <= 2).all()


@pytest.mark.usefixtures("forks")
def test_sparse_training_in_full_precision_ends_with_a_plain_model(shell):  # noqa: F811
    without_scheme(shell)
    steps = ["callbacks.prune.sparsity=0.7", "callbacks.prune.every_n_steps=1", "trainer.max_steps=6"]
    output = shell.run("method=fp", *steps, "hydra.run.dir=run")
    assert "pruned: 70.0%" in output
    assert list(shell.rows("run")) == ["full precision", "after training", "saved, loaded"]
    rows = shell.rows("run")
    assert rows["saved, loaded"]["perplexity"] == rows["after training"]["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(shell.folder / "run" / "pretrained")
    for block in model.model.layers:
        assert abs((block.mlp.down_proj.weight == 0).float().mean() - 0.7) < 1e-3


def test_parts_are_removed_then_quantized_and_a_killed_run_goes_on(shell):  # noqa: F811
    shell.run(*LONG, *STRUCTURED, "hydra.run.dir=whole", forks=True)
    rows = shell.rows("whole")
    smaller = rows["without the parts that were removed"]
    assert list(rows)[:3] == ["full precision", "without the parts that were removed", "rounded to nearest"]
    assert smaller["mib"] < 0.6 * rows["full precision"]["mib"]
    loaded = qat.load(shell.folder / "whole" / "native")
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (1, 96)
    process = shell.start(*shell.options, *LONG, *STRUCTURED, "hydra.run.dir=killed")
    wait_for(shell.folder / "killed" / "checkpoints" / "last.ckpt", process)
    process.kill()
    process.wait()
    shell.run("resume=killed", defaults=False)
    whole, resumed = weights(shell.folder / "whole"), weights(shell.folder / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert shell.rows("whole") == shell.rows("killed")


@pytest.mark.usefixtures("forks")
def test_a_scheme_that_does_not_fit_what_is_left_is_refused_at_once(shell):  # noqa: F811
    options = ["prune=structured", "prune.structured.channels=0.6", "prune.structured.multiple_of=2"]
    error = shell.fails(*options, "hydra.run.dir=run")
    assert "The group size 32 does not divide 52" in error
    assert not (shell.folder / "run" / "results.json").exists()
