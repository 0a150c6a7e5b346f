"""The command line as a user meets it: whole runs of a tiny model in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lightning_modules.forked import Forked

ROOT = Path(__file__).parents[2]


class Shell:
    def __init__(self, folder, model, text):
        self.folder = folder
        self.options = [
            "model=hf",
            f"model.name={model}",
            "data=text",
            f"data.path={text}",
            "data.sequence_length=32",
            "data.val_windows=8",
            "scheme=w3",
            "scheme.weight.granularity=per_group_32",
            "trainer.accelerator=cpu",
            "threads=1",
        ]
        self.preexec, self.forks = None, False
        self.environment = os.environ | {"QAT_CACHE": str(folder / "cache"), "COLUMNS": "200"}

    def start(self, *arguments, forks=None, script=ROOT / "train.py", environment=None):
        environment = environment or self.environment
        if self.forks if forks is None else forks:
            return Forked(script, arguments, self.folder, environment)
        command = [sys.executable, str(script), *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            preexec_fn=self.preexec,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments, code=0, defaults=True, sweep=False, config_dir=None, forks=None):
        flags = [*(["-m"] if sweep else []), *([f"--config-dir={config_dir}"] if config_dir else [])]
        process = self.start(*flags, *(self.options if defaults else []), *arguments, forks=forks)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def fails(self, *arguments, defaults=True):
        output = self.run(*arguments, code=1, defaults=defaults)
        assert "Traceback" not in output
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, output
        return errors[0]

    def rows(self, name):
        report = json.loads((self.folder / name / "results.json").read_text())
        return {row["row"]: row for row in report["rows"]}


@pytest.fixture
def shell(tmp_path, tiny_folder, text_file):
    return Shell(tmp_path, tiny_folder, text_file)


@pytest.fixture
def forks(shell):
    """For tests of what options do. Of runs that end with the same bits only one is: the others hash otherwise."""
    shell.forks = True


def weights(folder):
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state["state_dict"]


def test_a_run_ends_with_the_table_the_picture_and_the_artifact(shell):
    import qat

    output = shell.run("trainer.max_steps=60", "optimizer.lr=3e-3", "hydra.run.dir=run")
    rows = shell.rows("run")
    assert list(rows) == [
        "full precision",
        "rounded to nearest",
        "after training, fake-quantized",
        "converted, saved, loaded",
    ]
    trained, shipped = rows["after training, fake-quantized"], rows["converted, saved, loaded"]
    assert shipped["perplexity"] == trained["perplexity"]
    assert trained["perplexity"] < 0.8 * rows["rounded to nearest"]["perplexity"]
    assert trained["bits_per_weight"] == 3.5
    assert all(name in output for name in rows)
    assert (shell.folder / "run" / "training.png").stat().st_size > 10_000
    assert qat.load(shell.folder / "run" / "native").config.model_type == "llama"


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    "arguments",
    [
        ["scheme=w4a8", "quantizer@scheme.weight=kmeans", "scheme.weight.bits=3"],
        ["scheme=w4a8", "quantizer@scheme.input=minmax_static", "trainer.precision=bf16-mixed"],
        ["quantizer@scheme.weight=nf4_double", "scheme.weight.bits=4", "trainer.precision=bf16-true"],
        ["quantizer@scheme.weight=lsq_plus"],
        ["method=fp", "trainer.accumulate_grad_batches=2"],
        ["trainer.enable_progress_bar=false", "callbacks.monitor=null", "trainer.max_epochs=1", "trainer.max_steps=-1"],
        ["logger=tensorboard"],
        ["scheme.embedding=true", "quantizer@scheme.grad=grad_token"],
        [
            *("kv@scheme.kv=kivi", "scheme.kv.value.granularity=per_group_16", "quantizer@scheme.input=fp8_token"),
            *("callbacks.smooth_start.delay_steps=1", "scheme.kv.window=4", "data.sequence_length=48"),
        ],
        ["data.batch_size=2", "module.gradient_checkpointing=true", "optimizer=adamw8bit", "scheduler=constant"],
        [
            *("module.compile=aot_eager", "data.batch_size=4", "optimizer=paged_adamw8bit"),
            *("callbacks.profile.steps=1", "callbacks.profile.warmup=1"),
        ],
    ],
    ids=[
        "w4a8 kmeans",
        "static bf16-mixed",
        "nf4 bf16-true",
        "lsq_plus",
        "fp",
        "epochs",
        "tensorboard",
        "embedding and gradients",
        "kivi cache, fp8, smooth start",
        "checkpointing",
        "compiled, profiled",
    ],
)
def test_methods_schemes_and_precisions(shell, arguments):
    if "method=fp" in arguments:
        shell.options = [option for option in shell.options if not option.startswith("scheme")]
    shell.run("debug=fast", *arguments)


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scheme=fp8", "trainer.precision=bf16-mixed"], True),
        (["scheme=w8a8g8", "callbacks.smooth_start.ramp_steps=1", "callbacks.monitor.every_n_steps=1"], False),
        (["scheme=w4a8", "scheme.compute=int8", "scheme.weight.granularity=per_channel"], False),
    ],
    ids=["fp8", "w8a8g8", "w4a8"],
)
def test_runs_with_products_of_codes_ship_what_they_evaluate(shell, arguments, said):
    shell.options = [option for option in shell.options if not option.startswith("scheme")]
    output = shell.run("debug=fast", *arguments)
    assert "the same logits as the trained model" in output
    assert ("a CPU multiplies these codes in float32" in output) == said


@pytest.mark.usefixtures("forks")
def test_rounding_does_not_train(shell):
    output = shell.run("method=ptq", "calibration_batches=10000", "hydra.run.dir=run")
    assert "batches, all that the training text fills, not 10000" in output
    assert list(shell.rows("run")) == ["full precision", "rounded to nearest", "converted, saved, loaded"]
    assert all(row["step"] == 0 for row in shell.rows("run").values())


@pytest.mark.usefixtures("forks")
def test_quantized_gradients_train_a_full_precision_model(shell):
    shell.options = [option for option in shell.options if not option.startswith("scheme")]
    grad = ["quantizer@scheme.grad=minmax", "scheme.grad.bits=4", "scheme.grad.granularity=per_group_32"]
    output = shell.run("method=grad_quant", *grad, "trainer.max_steps=60", "optimizer.lr=3e-3", "hydra.run.dir=run")
    rows = shell.rows("run")
    assert list(rows) == ["full precision", "after training"]
    assert rows["after training"]["perplexity"] < 0.8 * rows["full precision"]["perplexity"]
    assert rows["after training"]["bits_per_weight"] == 32
    assert "Nothing was exported: the scheme quantizes no weight, key or value." in output
    assert not (shell.folder / "run" / "native").exists()


@pytest.mark.usefixtures("forks")
def test_a_sweep_runs_every_value(shell):
    offline = ["logger=wandb", "logger.offline=true"]
    shell.run("debug=fast", "scheme.weight.bits=2,4", *offline, "hydra.sweep.dir=sweep", sweep=True)
    for job in "01":
        (own,) = (shell.folder / "sweep" / job / "wandb").glob("offline-run-*")
        assert own.is_dir()
    assert shell.rows("sweep/0")["converted, saved, loaded"]["bits_per_weight"] == 2.5
    assert shell.rows("sweep/1")["converted, saved, loaded"]["bits_per_weight"] == 4.5


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


LONG = ["trainer.max_steps=40", "callbacks.checkpoint.every_n_steps=7", "data.batch_size=2"]


SHORT = ["trainer.accumulate_grad_batches=2", "data.path=short.txt"]
EIGHT_BIT = ["optimizer=adamw8bit", "trainer.precision=bf16-true", "quantizer@scheme.weight=kmeans"]


@pytest.mark.parametrize("extra", [[], SHORT, EIGHT_BIT], ids=["plain", "epochs", "8-bit bf16"])
def test_killed_and_resumed_ends_with_the_same_bits(shell, extra, text_file):
    """kill -9 at whatever step it hits; with `epochs`, several epochs and accumulation in between."""
    (shell.folder / "short.txt").write_text(text_file.read_text()[:2000])
    shell.run(*LONG, *extra, "hydra.run.dir=whole", forks=True)
    process = shell.start(*shell.options, *LONG, *extra, "hydra.run.dir=killed")
    wait_for(shell.folder / "killed" / "checkpoints" / "last.ckpt", process)
    process.kill()
    process.wait()
    shell.run("resume=killed", defaults=False)
    whole, resumed = weights(shell.folder / "whole"), weights(shell.folder / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert shell.rows("whole") == shell.rows("killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_resume(shell, number):
    steps = ["trainer.max_steps=4000", "callbacks.checkpoint.every_n_steps=5", "hydra.run.dir=stopped"]
    process = shell.start(*shell.options, *steps)
    wait_for(shell.folder / "stopped" / "checkpoints" / "last.ckpt", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "everything is saved" in output
    assert f"resume={shell.folder / 'stopped'}" in output
    assert "Traceback" not in output
    step = torch.load(shell.folder / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    shell.run("resume=stopped", f"trainer.max_steps={step + 3}", defaults=False, forks=True)
    assert "converted, saved, loaded" in shell.rows("stopped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_outside_training_has_its_own_code(shell, number):
    process = shell.start(*shell.options, "trainer.max_steps=4000", "hydra.run.dir=early")
    wait_for(shell.folder / "early" / ".hydra" / "overrides.yaml", process)
    time.sleep(1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"resume={shell.folder / 'early'}" in output


def test_a_run_is_resumed_from_anywhere(shell, text_file):
    """Its relative paths, and configs of the user's own, are found from another folder too."""
    (shell.folder / "short.txt").write_text(text_file.read_text())
    own = shell.folder / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    shell.run(*shell.options, "data.path=short.txt", "trainer.max_steps=2", "experiment=mine", "hydra.run.dir=run",
              defaults=False, config_dir="conf", forks=True)  # fmt: skip
    run, shell.folder = shell.folder / "run", shell.folder / "conf"
    shell.run(f"resume={run}", "trainer.max_steps=3", defaults=False)
    assert json.loads((run / "results.json").read_text())["rows"][-1]["step"] == 3


def test_a_finished_run_goes_on_and_is_measured_again(shell, text_file):
    """In the middle of an epoch, with a constant rate, it ends where a run of all steps ends."""
    (shell.folder / "short.txt").write_text(text_file.read_text()[:2000])
    steady = ["scheduler=constant", "data.path=short.txt", "data.batch_size=8"]
    shell.run(*steady, "trainer.max_steps=8", "hydra.run.dir=whole", forks=True)
    shell.run(*steady, "trainer.max_steps=4", "hydra.run.dir=run")
    before = shell.rows("run")
    output = shell.run("resume=run", "trainer.max_steps=8", defaults=False)
    whole, extended = weights(shell.folder / "whole"), weights(shell.folder / "run")
    assert all(torch.equal(whole[name], extended[name]) for name in whole)
    after = shell.rows("run")
    assert after["rounded to nearest"] == before["rounded to nearest"]
    assert after["converted, saved, loaded"]["step"] == 8
    assert "going on from a checkpoint: at step 4 of 8" in output


@pytest.mark.usefixtures("forks")
def test_the_folder_of_a_run_is_its_own(shell):
    shell.run("debug=fast", "hydra.run.dir=run")
    before = (shell.folder / "run" / ".hydra" / "overrides.yaml").read_text()
    error = shell.fails("debug=fast", "scheme.weight.bits=2", "hydra.run.dir=run")
    assert f"holds another run: go on with it by resume={shell.folder / 'run'}" in error
    assert (shell.folder / "run" / ".hydra" / "overrides.yaml").read_text() == before
    weights = shell.folder / "run" / "native" / "model.safetensors"
    assert weights.stat().st_mode == (weights.parent / "config.json").stat().st_mode


@pytest.mark.usefixtures("forks")
def test_a_model_without_its_weights_is_refused(shell, tiny_folder):
    copy = shutil.copytree(tiny_folder, shell.folder / "half")
    tensors = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "down_proj" not in k}, copy / "model.safetensors", {"format": "pt"})
    assert "which would be random" in shell.fails(f"model.name={copy}")


@pytest.mark.usefixtures("forks")
def test_a_run_that_diverged_ships_nothing(shell):
    error = shell.fails("trainer.max_steps=30", "optimizer.lr=100", "hydra.run.dir=run")
    assert "optimizer.lr" in error
    assert not (shell.folder / "run" / "native").exists()


@pytest.mark.usefixtures("forks")
def test_a_loss_that_explodes_names_step_and_layer(shell):
    error = shell.fails("trainer.max_steps=50", "optimizer.lr=1e30", "trainer.gradient_clip_val=null")
    assert "step" in error
    assert "layers" in error or "embed" in error


@pytest.mark.usefixtures("forks")
def test_a_damaged_checkpoint_is_named(shell):
    shell.run("debug=fast", "hydra.run.dir=run")
    checkpoint = shell.folder / "run" / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    (shell.folder / "run" / "results.json").unlink()
    assert "is damaged" in shell.fails("resume=run", defaults=False)


def test_help_lists_the_groups(shell):
    output = shell.run("--help", defaults=False)
    assert "quantizer" in output
    assert "scheme" in output


@pytest.mark.usefixtures("forks")
def test_one_run_exports_to_several_engines_and_says_how_faithfully(shell):
    output = shell.run("debug=fast", "export=[native,gptq]", "hydra.run.dir=run")
    for name in ("native", "gptq"):
        folder = shell.folder / "run" / name
        assert f"{folder}: the same logits as the trained model" in output
        report = json.loads((folder / "parity.json").read_text())
        assert report["packed, read back"] | {"perplexity": None} == {
            "max_abs_delta_logit": 0.0, "kl": 0.0, "top1_agreement": 1.0, "perplexity": None
        }  # fmt: skip
        assert report["bits_per_weight_claimed"] == 3.5 < report["bits_per_weight_actual"]
        card = (folder / "README.md").read_text()
        assert "'export=[native,gptq]'" in card
        assert "| after training, fake-quantized |" in card
    rows = shell.rows("run")
    assert rows["converted, saved, loaded"]["perplexity"] == rows["converted, saved, loaded as gptq"]["perplexity"]


@pytest.mark.usefixtures("forks")
def test_what_an_engine_cannot_hold_is_refused_before_anything_is_computed(shell):
    error = shell.fails("export=[native,gptq]", "scheme.weight.granularity=per_group_16", "hydra.run.dir=run")
    assert error.startswith("Error: GPTQ cannot hold model.layers.0.self_attn.q_proj, which has scales per_group_16.")
    assert "scheme.weight.granularity=per_group_32" in error
    assert not (shell.folder / "run" / "results.json").exists()


@pytest.mark.usefixtures("forks")
def test_an_artifact_is_exported_and_trained_on(shell):
    """`qat-export` writes what the run itself would have; and training goes on from the grid that was shipped."""
    shell.run("debug=fast", "export=[native,gptq]", "hydra.run.dir=run")
    text = [option for option in shell.options if option.startswith("data")]
    arguments = ["artifact=run/native", "export=gptq", *text, "hydra.run.dir=exported"]
    process = shell.start(*arguments, script=ROOT / "lightning_modules" / "export.py")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    one, two = (shell.folder / place / "gptq" / "model.safetensors" for place in ("run", "exported"))
    assert one.read_bytes() == two.read_bytes()
    output = shell.run("debug=fast", "model.name=run/gptq", "hydra.run.dir=again")
    assert "14 of 14 quantized layers start on the grid that they were loaded from" in output
    rows = shell.rows("again")
    assert rows["as loaded, on its grid"]["perplexity"] == rows["rounded to nearest"]["perplexity"]
