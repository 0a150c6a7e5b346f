"""What a tool is given and what it leaves, as files: tools need environments that exclude one another.

`inputs/` holds `model/` (by save_pretrained, with its tokenizer) and `calibration.safetensors` (`input_ids`,
`[windows, tokens]`). The folder of a job holds `job.json`, whose fields are those of `Job`; the tool adds
`weights.safetensors`, the tensors that it changed under the model's own names and dequantized, and then `result.json`.
Tools other than `ours` import nothing of this project but this file.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

MODEL, CALIBRATION = "model", "calibration.safetensors"
JOB, WEIGHTS, RESULT = "job.json", "weights.safetensors", "result.json"


@dataclass(frozen=True)
class Job:
    """One model to quantize: all its linear layers but the output head, weights only.

    Attributes:
        inputs: folder of the model and of the calibration windows.
        method: `gptq`, `awq`, `autoround`, or a name that begins with `rtn`.
        grid: `int`, or `kmeans`, a codebook for each row.
        group_size: inputs that share a scale; 0 for whole rows.
        batch_size: windows of a batch.
        options: of this tool alone.
    """

    inputs: str
    method: str
    grid: str
    bits: int
    group_size: int
    symmetric: bool
    batch_size: int
    device: str
    options: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `job.json`, and take away what an earlier attempt left."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        (folder / JOB).write_text(json.dumps(asdict(self), indent=1))

    def load_model(self, **options: Any) -> Any:
        """The model in the type that it was saved in, on the CPU, where every tool begins."""
        return AutoModelForCausalLM.from_pretrained(Path(self.inputs) / MODEL, dtype="auto", **options).eval()

    def windows(self) -> Tensor:
        """Calibration windows `[windows, tokens]`, of equal length, without padding."""
        return load_file(Path(self.inputs) / CALIBRATION)["input_ids"]


@dataclass(frozen=True)
class Timed:
    """What quantizing took, and what it returned."""

    seconds: float
    peak_bytes: int | None
    value: Any


def read_job() -> tuple[Job, Path]:
    """The job whose folder is the command's only argument."""
    folder = Path(sys.argv[1])
    return Job(**json.loads((folder / JOB).read_text())), folder


def timed(device: str, quantize: Callable[[], Any]) -> Timed:
    """Run `quantize`; importing, loading, saving and the device's own start are not in it."""
    on_gpu = torch.device(device).type == "cuda"
    first = torch.ones(64, 64, device=device)
    first @ first
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    value = quantize()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Timed(seconds, torch.cuda.max_memory_allocated() if on_gpu else None, value)


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Every linear layer but the output head, by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def loss(model: Any, windows: Tensor, device: str) -> float:
    """Mean next-token loss of some windows, so that a reader of the weights can tell that it understood them."""
    ids = windows.to(device)
    return float(model.to(device)(input_ids=ids, labels=ids, use_cache=False).loss)


def leave(
    folder: Path,
    measured: Timed,
    weights: dict[str, Tensor],
    first_loss: float,
    settings: dict[str, Any],
    packages: tuple[str, ...],
) -> None:
    """Write the weights, and `result.json` last: with it the job is done.

    Args:
        weights: by the names of the model's parameters.
        first_loss: of the quantized model, as its tool runs it, on the first batch of calibration windows.
        settings: how the tool was run, for the row of the result.
        packages: whose versions belong to the row.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS)
    result = {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes, "loss": first_loss, "settings": settings}
    result["versions"] = {name: version(name) for name in ("torch", "transformers", *packages)}
    temporary = folder / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / RESULT)
