"""Quantization without training, killed and resumed from the command line."""

import re
import signal
from pathlib import Path

import pytest

from tests.lightning_modules.test_cli import ROOT, shell  # noqa: F401

DYING = Path(__file__).parent / "dying_train.py"
OPTIONS = ["method=ptq", "calibration_batches=2"]


def dying(shell, *arguments, code=0, forks=False, **when):  # noqa: F811
    """Run until it dies or ends; how many columns it rounded, and the blocks that it finished."""
    environment = shell.environment | {"PYTHONPATH": str(ROOT)} | when
    process = shell.start(*arguments, forks=forks, script=DYING, environment=environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    counts = re.search(r"columns (\d+), blocks (.*)", output)
    return counts and (int(counts[1]), counts[2])


def artifact(shell, run):  # noqa: F811
    return (shell.folder / run / "native" / "model.safetensors").read_bytes()


def test_killed_in_the_middle_of_a_layer_it_ends_with_the_same_bits(shell):  # noqa: F811
    options = [*shell.options, *OPTIONS, "transforms=gptq"]
    columns, blocks = dying(shell, *options, "hydra.run.dir=whole", forks=True)
    assert blocks == "[0, 1]"
    middle = columns // 2 + 100  # of the second block
    dying(shell, *options, "hydra.run.dir=killed", code=-signal.SIGKILL, DIE_AT_COLUMN=str(middle))
    assert [path.name for path in (shell.folder / "killed" / "gptq").iterdir()] == ["block0.safetensors"]
    assert dying(shell, "resume=killed") == (columns // 2, "[1]")  # the first block was not done again
    assert artifact(shell, "killed") == artifact(shell, "whole")
    assert shell.rows("killed") == shell.rows("whole")
    assert not (shell.folder / "killed" / "gptq").exists()


@pytest.mark.parametrize("transform", ["awq_gptq", "sparsegpt", "autoround", "reconstruct"])
def test_killed_before_the_export_nothing_is_done_again(shell, transform):  # noqa: F811
    options = [*shell.options, *OPTIONS, f"transforms={transform}"]
    options += [f"transforms.{transform}.steps=5"] if transform in ("autoround", "reconstruct") else []
    dying(shell, *options, "hydra.run.dir=whole", forks=True)
    dying(shell, *options, "hydra.run.dir=killed", code=-signal.SIGKILL, DIE_BEFORE_EXPORT="1")
    assert dying(shell, "resume=killed") == (0, "[]")
    assert artifact(shell, "killed") == artifact(shell, "whole")
    assert not list((shell.folder / "killed").rglob("block*"))
