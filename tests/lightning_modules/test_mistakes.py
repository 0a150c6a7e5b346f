"""What a user gets wrong on the command line: one line that names the mend."""

import sys

import pytest

from lightning_modules import cli
from tests.lightning_modules.test_cli import Shell, forks, shell

__all__ = ["Shell", "forks", "shell"]

MISTAKES = [
    (["trainer.max_step=3"], "Did you mean 'max_steps'"),
    (["scheme=w33"], "Did you mean 'w3'"),
    (["quantizer@scheme.weight=kmean"], "Did you mean 'kmeans'"),
    (["shceme=w3"], "Did you mean 'scheme'"),
    (["scheme.weight.bits=9"], "2 to 8 bits"),
    (["scheme.weight.bits=three"], "2 to 8 bits, not three"),
    (["scheme.weight.granularity=per_group_48"], "Sizes that do"),
    (["scheme.exclude=[nothing]"], "matches no layer"),
    (["scheme.exclude=*"], "excludes every layer"),
    (["data.path=empty.txt"], "is empty"),
    (["data.path=missing.txt"], "no text at"),
    (["data.batch_size=0"], "data.batch_size is 0"),
    (["optimizer.lr=-1"], "optimizer.lr is -1; it is a positive number"),
    (["optimizer.lr=abc"], "optimizer.lr is abc; it is a positive number"),
    (["trainer.max_steps=abc"], "trainer.max_steps is abc; it is a whole number"),
    (["trainer.max_steps=0"], "take method=ptq"),
    (["trainer.max_steps=-1"], "How long to train is unknown"),
    (["quantizer=kmeans"], "write quantizer@scheme.weight=kmeans"),
    (["kv=kivi"], "write kv@scheme.kv=kivi"),
    (["quantizer@scheme.weights=kmeans"], "write quantizer@scheme.weight=kmeans"),
    (["scheme.weight=kmeans"], "choose one by its group, as in quantizer@scheme.weight=kmeans"),
    (["method=fp"], "scheme=w3 with it: leave out one of them"),
    (["method=grad_quant"], "add quantizer@scheme.grad=grad_token"),
    (["callbacks.smooth_start.ramp_steps=1"], "is for activations, keys and values, and the scheme quantizes none"),
    (["callbacks.refresh.every_n_steps=1"], "is for k-means codebooks"),
    (["transforms=fisher"], "take quantizer@scheme.weight=kmeans with init=kmeans"),
    (["kv@scheme.kv=kivi", "scheme.kv.value.granularity=per_group_16"], "No token would leave the window"),
    (["scheme.kv.window=4"], "no cache is quantized: choose kv@scheme.kv=kivi"),
    (["model.attention=flash_attention_2"], "Set model.attention=sdpa"),
    (["model.name=/no/folder"], "there is no such folder"),
    (["data.batch_size=abc"], "The options of 'data' were refused: TypeError"),
    (["data.val_windows=0"], "data.val_windows is 0"),
    (["data.sequence_length=65"], "set data.sequence_length to at most 64"),
    (["trainer.limit_val_batches=0"], "Nothing was evaluated"),
    (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches is 0"),
    (["callbacks.checkpoint.every_n_steps=0"], "every_n_steps is 0"),
    (["callbacks.monitor.every_n_steps=0"], "every_n_steps is 0"),
    (["threads=abc"], "threads is abc"),
    (["seed=-1"], "seed is -1"),
    (["model.dtype=float23"], "Did you mean 'float32'"),
    (["scheme.weight.granularity=per_channel_5"], "has no dimension 5"),
    (["trainer.devices=2", "trainer.strategy=ddp_spawn"], "is one of trainer.strategy=ddp"),
    (["model.name=no/such-model"], "Cannot load the model"),
    (["transforms=none", "quantizer@scheme.input=minmax_static"], "static but nothing calibrated it"),
    (["resume=nowhere"], "not the folder of a run"),
    (["ckpt_path=nowhere.ckpt"], "no checkpoint at"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
@pytest.mark.usefixtures("signals_restored")
def test_mistakes_get_one_line(shell, monkeypatch, capsys, arguments, expected):
    """In this process, which has imported everything already."""
    (shell.folder / "empty.txt").write_text("")
    monkeypatch.chdir(shell.folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *shell.options, "debug=fast", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("Error: ")
    assert expected in errors[-1]
    assert not any("Traceback" in line or line.startswith("Error: ") for line in errors[:-1])


@pytest.mark.usefixtures("forks")
def test_a_missing_required_option_is_named(shell):
    assert "model.name" in shell.fails("model=hf", defaults=False)
