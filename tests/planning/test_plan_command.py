"""`qat-plan` as a user meets it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from lightning_modules import plan as command
from lightning_modules.signals import exit_on_signals
from qat.errors import InputError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture
def options(tiny_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [
        *("model=hf", f"model.name={tiny_folder}", "data=text", f"data.path={text_file}", "data.sequence_length=32"),
        *(f"paths.cache_dir={tmp_path}/cache", "signal=fisher", "calibration_batches=4"),
        *("accelerator=cpu", "threads=1"),
    ]


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("plan", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def in_a_process(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_what_it_plans_is_what_training_takes(options, capsys):
    command._run(composed(*options, "budget=3.6", "name=mine"))
    output = capsys.readouterr().out
    report = json.loads(Path("plans/mine.json").read_text())
    assert report["bits_per_weight"] <= 3.6
    assert f"{report['bits_per_weight']:.3f} bits per weight, planned by fisher" in output
    assert Path("plans/mine.png").stat().st_size > 10_000
    assert list(Path("plans/rows").glob("fisher-*.jsonl"))
    (line,) = re.findall(r"python train\.py (.*)", output)
    rest = [option for option in options if option.startswith(("model", "data", "paths", "threads"))]
    arguments = [*shlex.split(line), "method=ptq", "trainer.accelerator=cpu", "hydra.run.dir=run", *rest]
    code, text = in_a_process(str(ROOT / "train.py"), *arguments)
    assert code == 0, text
    rows = {row["row"]: row for row in json.loads(Path("run/results.json").read_text())["rows"]}
    assert rows["converted, saved, loaded"]["bits_per_weight"] == pytest.approx(report["bits_per_weight"])


def test_a_plan_for_gptq(options, capsys):
    command._run(composed(*options, "budget=3.6", "signal=kfac", "rounding=gptq"))
    assert "planned by kfac for gptq: " in capsys.readouterr().out
    assert json.loads(Path("plans/mixed.json").read_text())["rounding"] == "gptq"
    assert list(Path("plans/rows").glob("kfac-gptq-*.jsonl"))


@pytest.mark.usefixtures("signals_restored")
def test_one_that_is_stopped_says_how_to_go_on(options, capsys, monkeypatch):
    module = sys.modules["qat.planning.sensitivity"]
    monkeypatch.setattr(module, "errors", lambda *_: signal.raise_signal(signal.SIGTERM))
    exit_on_signals()
    with pytest.raises(SystemExit):
        command._run(composed(*options, "budget=3.6"))
    assert "The same command goes on: what was measured is kept in plans/rows." in capsys.readouterr().out


def test_candidates_are_chosen_like_any_quantizer(options):
    added = ["+quantizer@candidates.fp8=fp8", "candidates.int5=null", "+allow={*.1.mlp.down_proj: fp8}"]
    command._run(composed(*options, "budget=9", "signal=entropy", *added))
    report = json.loads(Path("plans/mixed.json").read_text())["layers"]
    assert report["model.layers.1.mlp.down_proj"]["candidate"] == "fp8"
    assert "int5" not in report["model.layers.0.mlp.down_proj"]["costs"]
    assert "/quantizer@rules.fp8.weight: fp8" in Path("plans/scheme/mixed.yaml").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=2"], "below the least"),
        (["budget=three"], "it is a number"),
        (["unit=ms", "budget=1"], "needs a table"),
        (["name=w3"], "There is a scheme 'w3' already"),
        (["name=a/b"], "letters, digits"),
        (["signal=hessian"], "no signal 'hessian'"),
        (["rounding=awq"], "no rounding 'awq'"),
        (["+candidates.int7={bits: 7}"], r"add \+quantizer@candidates\.int7=lsq"),
        (["calibration_batches=0"], "whole number from 1"),
        (["calibration_batches=1", "data.batch_size=1"], "Too little data"),
        (["accelerator=gpu"], "choose auto or cpu"),
    ],
)
def test_mistakes_are_refused(options, overrides, message):
    with pytest.raises(InputError, match=message):
        command._run(composed(*options, *overrides))


def test_a_mistake_is_one_line(tmp_path):
    code, output = in_a_process("-m", "lightning_modules.plan", "signall=kl")
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Did you mean 'signal'" in errors[0]
    assert "Traceback" not in output


def test_every_command_of_the_page_composes():
    text = (ROOT / "docs" / "mixed_precision.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python -m lightning_modules\.plan([^`\n#]*)", text)
    assert len(commands) >= 4
    first = (CONFIGS / "plan.yaml").read_text().partition("\n")[0]
    assert first.startswith("# python -m lightning_modules.plan ")
    for line in (*commands, first.partition("plan ")[2].partition("  ")[0]):
        composed(*shlex.split(line))
