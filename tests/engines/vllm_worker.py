"""Runs in the environment of vLLM: the log probabilities of the likeliest tokens at every position."""

import json
import sys
from pathlib import Path

import vllm
from vllm import LLM, SamplingParams


def main(asked: Path, answered: Path) -> None:
    request = json.loads(asked.read_text())
    ids, count = request["ids"], request["count"]
    model = LLM(
        model=request["folder"], dtype=request["dtype"], max_model_len=len(ids[0]) + 8, enforce_eager=True,
        max_logprobs=count, skip_tokenizer_init=True,
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=count, detokenize=False)
    done = model.generate([{"prompt_token_ids": row} for row in ids], wanted)
    # Position 0 is predicted by nothing.
    rows = [[{token: p.logprob for token, p in found.items()} for found in one.prompt_logprobs[1:]] for one in done]
    answered.write_text(json.dumps({"version": f"vllm {vllm.__version__}", "log_p": rows}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
