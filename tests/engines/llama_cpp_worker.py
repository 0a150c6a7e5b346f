"""Runs in the environment of llama-cpp-python: the log probabilities of the likeliest tokens at every position."""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(asked: Path, answered: Path) -> None:
    request = json.loads(asked.read_text())
    count = request["count"]
    model = llama_cpp.Llama(
        str(Path(request["folder"]) / "model.gguf"), n_ctx=len(request["ids"][0]) + 8, logits_all=True, verbose=False
    )
    rows = []
    for ids in request["ids"]:
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[: len(ids) - 1], np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        best = np.argsort(-log_p, axis=1)[:, :count]
        rows.append([{str(t): float(p[t]) for t in some} for p, some in zip(log_p, best, strict=True)])
    answered.write_text(json.dumps({"version": f"llama-cpp-python {llama_cpp.__version__}", "log_p": rows}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
