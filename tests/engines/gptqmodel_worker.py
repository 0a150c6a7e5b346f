"""Runs in the environment of GPTQModel: the log probabilities of the likeliest tokens at every position."""

import json
import sys
from pathlib import Path

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel


@torch.no_grad()
def main(asked: Path, answered: Path) -> None:
    request = json.loads(asked.read_text())
    model = GPTQModel.load(
        request["folder"], device="cpu", backend=BACKEND.TORCH, dtype=getattr(torch, request["dtype"])
    )
    log_p = model(input_ids=torch.tensor(request["ids"])).logits.float().log_softmax(-1)[:, :-1]
    best, tokens = log_p.topk(request["count"])
    rows = [
        [dict(zip(map(str, t.tolist()), p.tolist(), strict=True)) for p, t in zip(ps, ts, strict=True)]
        for ps, ts in zip(best, tokens, strict=True)
    ]
    answered.write_text(json.dumps({"version": f"gptqmodel {gptqmodel.__version__}", "log_p": rows}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
