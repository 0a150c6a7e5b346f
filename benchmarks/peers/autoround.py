"""AutoRound by its own package: `PYTHON -m benchmarks.peers.autoround FOLDER`, see benchmarks/peers/job.py.

Its defaults: 200 steps of signed gradient descent a block, of 8 windows each, in bf16. It is given every window and
draws its batches from them. It never attends to the last token of a window of its caller's.
"""

from types import SimpleNamespace
from typing import Any

import torch
from auto_round import AutoRound

from benchmarks.peers.job import leave, linear_layers, loss, read_job, timed

# It wants a tokenizer, of which it reads what padding looks like. No window is padded, and the end-of-text token that
# many tokenizers pad with is a token like others.
_NO_PADDING = SimpleNamespace(pad_token="none", pad_token_id=-1)


def main() -> None:
    """Quantize the model of one job."""
    job, folder = read_job()
    model, windows = job.load_model(), job.windows()
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(job.batch_size)]
    iters = job.options.get("iters", 200)
    grid = {"bits": job.bits, "group_size": job.group_size, "sym": job.symmetric}
    data = {"dataset": batches, "nsamples": len(windows), "seqlen": windows.shape[1], "batch_size": job.batch_size}

    def quantize() -> Any:
        tool = AutoRound(model, _NO_PADDING, scheme="W4A16", iters=iters, device_map=job.device, **grid, **data)
        return tool.quantize()[0]

    measured = timed(job.device, quantize)
    weights = {f"{name}.weight": layer.weight for name, layer in linear_layers(measured.value).items()}
    first_loss = loss(measured.value, windows[: job.batch_size], job.device)
    leave(folder, measured, weights, first_loss, {"act_order": None, "iters": iters}, ("auto-round",))


if __name__ == "__main__":
    main()
