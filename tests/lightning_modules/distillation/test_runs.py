"""`method=distill` as a user meets it: whole runs of a tiny model."""

import pytest
import torch
from safetensors.torch import load_file

from tests.lightning_modules.test_cli import Shell, forks, shell, weights

__all__ = ["Shell", "forks", "shell"]

DISTILL = ["method=distill", "debug=fast"]


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    "arguments",
    [
        ["distill.divergence=jsd", "distill.top_k=8", "trainer.accumulate_grad_batches=2", "module.compile=aot_eager"],
        [
            "distill=minilm",
            "distill.hidden.weight=1",
            "distill.hidden.layers=[0]",
            "module.gradient_checkpointing=true",
        ],
        ["distill.divergence=cakld", "distill.dtype=bfloat16", "trainer.precision=bf16-mixed"],
        ["prune=structured", "prune.structured.blocks=0.5", "prune.structured.multiple_of=32", "distill=minilm"],
        ["scheme.head=true", "trainer.precision=bf16-true", "transforms=rotate", "distill.weight=1"],
    ],
    ids=["jsd, top k, compiled", "hidden and attention", "cakld, 16 bits", "pruned", "rotated"],
)
def test_compositions(shell, arguments):
    output = shell.run(*DISTILL, *arguments, "hydra.run.dir=run")
    assert "teacher: " in output
    assert "the same logits as the trained model" in output
    state, artifact = weights(shell.folder / "run"), load_file(shell.folder / "run" / "native" / "model.safetensors")
    assert not any("teacher" in name for name in [*state, *artifact])
    header = (shell.folder / "run" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/cross_entropy", "train/divergence"} <= set(header.split(","))


def test_a_resumed_run_ends_with_the_same_bits(shell):
    """Gamma is measured again, and is the same."""
    options = [
        "method=distill",
        "distill.divergence=cakld",
        "callbacks.checkpoint.every_n_steps=1",
        "callbacks.monitor=null",
    ]
    shell.run(*options, "trainer.max_steps=4", "scheduler=constant", "hydra.run.dir=whole")
    shell.run(*options, "trainer.max_steps=2", "scheduler=constant", "hydra.run.dir=part", "export=none")
    shell.run("resume=part", "trainer.max_steps=4", "export=native", defaults=False)
    whole, part = weights(shell.folder / "whole"), weights(shell.folder / "part")
    assert all(torch.equal(part[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("teacher", [False, True], ids=["itself", "another teacher"])
def test_a_cache_is_computed_once_and_teaches_the_same(shell, tiny_folder, teacher):
    own = [f"distill.teacher={tiny_folder}"] if teacher else []
    options = [*DISTILL, *own, "distill.top_k=8", "data.batch_size=2", "trainer.accumulate_grad_batches=2"]
    cached = [*options, "distill.cache=logits", "distill.cache_dtype=float32"]
    shell.run(*options, "hydra.run.dir=living")
    first = shell.run(*cached, "hydra.run.dir=first")
    second = shell.run(*cached, "hydra.run.dir=second")
    line = f"teacher: {tiny_folder if teacher else f'{tiny_folder}, as it is now'}"
    assert line in first
    assert line not in second  # it is neither loaded nor copied
    for output in (first, second):
        assert "teacher: its logits for 8 windows are in" in output
        assert "the same logits as the trained model" in output
    living, *others = (weights(shell.folder / name) for name in ("living", "first", "second"))
    assert all(torch.equal(other[name], value) for name, value in living.items() for other in others)
    more = shell.run("resume=second", "trainer.max_steps=4", defaults=False)
    assert line in more
    assert "its logits for 16 windows are in" in more


@pytest.mark.usefixtures("forks")
def test_a_cache_measures_gamma_and_refuses_another_precision(shell):
    options = ["method=distill", "distill.divergence=cakld", "distill.top_k=8", "distill.cache=logits", "debug=fast"]
    output = shell.run(*options, "trainer.precision=bf16-mixed", "hydra.run.dir=run")
    assert "gives the next token a probability of 0.0" in output
    assert "its logits for 64 windows" in output  # those of 8 calibration batches, more than the 2 of training
    assert "with precision bf16-mixed (now 32-true)" in shell.fails(*options)


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=ptq", "distill=logits"], "method=ptq does not train: add distill=none, or take"),
        (["method=distill", "distill=none"], "leave out distill=none, or take method=qat"),
        (["method=distill", "distill.divergence=revers_kl"], "Did you mean 'reverse_kl'"),
        (["method=distill", "distill.temperature=0"], "distill.temperature is 0"),
        (["method=distill", "distill.weight=2"], "distill.weight is 2"),
        (["method=distill", "distill.top_k=1000"], "the vocabulary has 96 tokens"),
        (["method=distill", "distill.teacher=./none"], "there is no such folder"),
        (["method=distill", "transforms=rotate", "distill.hidden.weight=1"], "set distill.hidden.weight=0"),
        (["distill=minilm", "transforms=awq"], "set distill.attention.weight=0"),
        (["method=distill", "distill.hidden.layers=[5]", "distill.hidden.weight=1"], "the blocks are 0 to 1"),
        (["distill=minilm", "module.compile=aot_eager"], "module.compile=null"),
        (["method=distill", "distill.cache=logits"], "set distill.top_k=100"),
        (["distill=minilm", "distill.cache=logits", "distill.top_k=8"], "set distill.attention.weight=0, or"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_refused_gets_one_line(shell, arguments, message):
    assert message in shell.fails("debug=fast", *arguments)
