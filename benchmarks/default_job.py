"""The main job as a user runs it: perplexities, bits, and how long the whole command takes.

python -m benchmarks.default_job                 runs `python train.py` and writes results/default_job.json

Then the same steps on the same tokens without quantization, `python train.py method=fp`, for a row to compare with.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, record

COMPARED = "full precision, trained alike"


def main() -> None:
    """Run both jobs in fresh folders and keep their rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        rows = run(Path(folder) / "qat")
        seconds = time.perf_counter() - start
        picture = (Path(folder) / "qat" / "training.png").read_bytes()
        compared = run(Path(folder) / "fp", "method=fp")[-1] | {"row": COMPARED}
    rows = [rows[0], compared, *rows[1:], {"row": "whole command", "seconds": seconds}]
    record("default_job", "python -m benchmarks.default_job", rows)
    (ROOT / "docs" / "training.png").write_bytes(picture)


def run(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that one run reports."""
    command = [sys.executable, str(ROOT / "train.py"), *options, f"hydra.run.dir={folder}"]
    subprocess.run([*command, "callbacks.checkpoint.save_at_end=false"], check=True)
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    return rows


if __name__ == "__main__":
    main()
