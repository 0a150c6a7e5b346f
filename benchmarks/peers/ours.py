"""The methods of this project: `python -m benchmarks.peers.ours FOLDER`, see benchmarks/peers/job.py.

In a process of its own too, so that it starts as cold as the others. Defaults of `qat.transforms` throughout; LSQ's
least-squares scales everywhere but in `rtn-minmax`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qat
from benchmarks.peers.job import Job, leave, loss, read_job, timed
from qat import transforms
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms import quant_layers

Batches = list[dict[str, Tensor]]


def main() -> None:
    """Quantize the model of one job."""
    job, folder = read_job()
    model, windows = job.load_model(), job.windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = timed(job.device, lambda: quantize(job, model, windows))
    first_loss = loss(model, windows[: job.batch_size], job.device)
    settings = {"act_order": "static" if job.method == "gptq" else None}
    leave(folder, measured, changed(model, before), first_loss, settings, ())


def quantize(job: Job, model: nn.Module, windows: Tensor) -> None:
    """Quantize `model` in place, by the method and on the grid of `job`."""
    qat.prepare(model.to(job.device), qat.Scheme(weight=quantizer(job)))
    batches = [{"input_ids": ids, "labels": ids} for ids in windows.to(job.device).split(job.batch_size)]
    if not job.method.startswith("rtn"):
        getattr(transforms, job.method)(model, batches, **job.options)


def quantizer(job: Job) -> Any:
    """The factory of the weights' quantizers."""
    if job.grid == "kmeans":
        return partial(KMeansQuantizer, bits=job.bits)
    kind = MinMaxQuantizer if job.method == "rtn-minmax" else LSQQuantizer
    return partial(kind, bits=job.bits, granularity=f"per_group_{job.group_size}", symmetric=job.symmetric)


@torch.no_grad()
def changed(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What differs from `before`, the weights of quantized layers as their quantizers round them."""
    now = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name in before}
    found = {name: tensor for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    return found | {f"{name}.weight": layer.weight_quantizer(layer.weight) for name, layer in quant_layers(model)}


if __name__ == "__main__":
    main()
