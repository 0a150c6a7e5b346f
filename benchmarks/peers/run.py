"""Start a tool as a process, in an environment of its own."""

import os
import subprocess
from pathlib import Path

from benchmarks.peers.job import RESULT, Job
from benchmarks.record import ROOT


def run_tool(python: str, tool: str, job: Job, folder: Path) -> None:
    """Let `tool` do `job` in `folder`, where its own files end up too; what it prints goes to `log.txt` there.

    Args:
        python: its interpreter.
        tool: a module of benchmarks/peers.

    Raises:
        SystemExit: if it fails or leaves no result, with the end of what it printed.
    """
    job.write(folder)
    log = folder / "log.txt"
    command = [python, "-m", f"benchmarks.peers.{tool}", str(folder)]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    places = {"cwd": folder, "env": os.environ | {"PYTHONPATH": path}}
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, **places).returncode
    if code or not (folder / RESULT).is_file():
        end = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"{tool} stopped with code {code}; the end of {log}:\n{end}")
