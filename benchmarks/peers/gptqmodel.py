"""GPTQ by GPTQModel: `PYTHON -m benchmarks.peers.gptqmodel FOLDER`, see benchmarks/peers/job.py.

Its defaults: columns ordered within and between groups that stay as they are, 5 % damping, layers on the outputs of the
quantized ones before them in their block. Its kernels want 16 bits, so a model in float32 is loaded in bf16. 7.6.0
installs from source beside torch 2.13 within a minute, without CUDA too; its first run compiles and is slower than the
next.
"""

import os

# Its default on a machine of two cores is a single worker, and then it waits for itself.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT

from benchmarks.peers.job import MODEL, leave, loss, read_job, timed


def main() -> None:
    """Quantize the model of one job."""
    job, folder = read_job()
    windows = job.windows()
    # In the older format layers hold zero points that are one less, until they are saved and loaded again.
    config = QuantizeConfig(
        bits=job.bits, group_size=job.group_size, sym=job.symmetric, format=FORMAT.GPTQ_V2, offload_to_disk=False,
        device=job.device,
    )  # fmt: skip
    folder_of_model = str(Path(job.inputs) / MODEL)
    model = GPTQModel.load(folder_of_model, config, backend=BACKEND.TORCH, dtype=torch.bfloat16)
    data = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows]

    def quantize() -> None:
        model.quantize(data, batch_size=job.batch_size, calibration_sort=None, backend=BACKEND.TORCH)

    measured = timed(job.device, quantize)
    layers = {name: layer for name, layer in model.model.named_modules() if hasattr(layer, "dequantize_weight")}
    weights = {f"{name}.weight": layer.dequantize_weight().T for name, layer in layers.items()}
    first_loss = loss(model.model, windows[: job.batch_size], job.device)
    settings = {"act_order": "group-aware", "damping": config.damp_percent}
    leave(folder, measured, weights, first_loss, settings, ("gptqmodel",))


if __name__ == "__main__":
    main()
