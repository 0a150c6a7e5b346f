"""The main job as a user runs it: perplexities, bits, and how long the whole command takes.

python -m benchmarks.default_job                 runs `python train.py` and writes results/default_job.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import ROOT, record


def main() -> None:
    """Run the job in a fresh folder and keep its rows."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"hydra.run.dir={folder}",
            "callbacks.checkpoint.save_at_end=false",
        ]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        rows = json.loads((Path(folder) / "results.json").read_text())["rows"]
        picture = (Path(folder) / "training.png").read_bytes()
    (ROOT / "docs" / "training.png").write_bytes(picture)
    record("default_job", "python -m benchmarks.default_job", [*rows, {"row": "whole command", "seconds": seconds}])


if __name__ == "__main__":
    main()
