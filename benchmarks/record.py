"""Result files: what was measured, on what, with which versions and by which command."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qat.atomic import replaced_file

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def record(claim: str, command: str, rows: list[dict[str, Any]], packages: tuple[str, ...] = ()) -> Path:
    """Write `results/<claim>.json`."""
    path = RESULTS / f"{claim}.json"
    content = {
        "device": device(),
        "versions": versions("torch", "transformers", "pytorch-lightning", *packages),
        "commit": commit(),
        "command": command,
        "rows": rows,
    }
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    return path


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` finds, in JSON's types: now, or in an earlier run, which left it at `path`."""
    if not path.is_file():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as temporary:
            temporary.write_text(json.dumps(found))
    return json.loads(path.read_text())


def rows_so_far(work: Path) -> Iterator[dict[str, Any]]:
    """Rows that `keep_row` left in `work`, one a line."""
    if work.exists():
        yield from map(json.loads, work.read_text().splitlines())


def keep_row(work: Path, row: dict[str, Any]) -> None:
    """Show `row`, and add it to `work`."""
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def device() -> str:
    """The GPU, or the CPU with the number of cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} cores"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; packages that are missing are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, marked when the working tree differs from it.

    A copy of the tree on a machine without this repository says it by the variable QAT_COMMIT.
    """
    if "QAT_COMMIT" in os.environ:
        return os.environ["QAT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
