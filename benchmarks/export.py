"""Every export, by the engines that load it here: `python -m benchmarks.export`.

Three parts: SmolLM2-135M, rounded to each target's grid, in its engine; files of each target with something changed,
which must be read or refused; and memory and time to write a model of a billion parameters. What needs an environment
of its own is measured by `make test-engines`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import qat
from benchmarks.record import keep_row, record, rows_so_far
from lightning_modules.models import load_smollm2
from lightning_modules.shipping import Probe, check_shipped
from lightning_modules.sizes import tensor_bytes
from qat.export.checkpoint import Checkpoint
from qat.export.gguf.target import Gguf
from qat.export.layouts import Awq, BitsAndBytes, CompressedTensors, Gptq, LlmInt8, ModelOpt
from qat.export.native import Native
from qat.export.onnx.target import Onnx
from qat.export.targets import Target
from qat.quantizers import (
    KMeansQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NoQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
)
from tests.export.fuzz import TARGETS, fuzz

ROOT = Path(__file__).parents[1]
GIB = 2**30


class Case(NamedTuple):
    """What is exported: by which target, with which quantizers, computed in which dtype."""

    target: Callable[[], Target]
    weight: Callable[..., Any]
    input: Callable[..., Any] = NoQuantizer
    dtype: str = "float32"


def _integers(bits: int, granularity: str = "per_group_64", **options: Any) -> Callable[..., Any]:
    return partial(MinMaxQuantizer, bits=bits, granularity=granularity, **options)


FP8 = partial(MinMaxQuantizer, format="fp8_e4m3", granularity="per_channel", scale_dtype="float32")
FP8_TOKEN = partial(MinMaxQuantizer, format="fp8_e4m3", granularity="per_token", scale_dtype="float32")
TOKEN = _integers(8, "per_token", scale_dtype="float32")
NF4 = partial(TableQuantizer, bits=4, granularity="per_group_64", double_quant=True)
HALF = {"granularity": "per_group_32", "scale_dtype": "float16"}
CASES = {
    "native, 3-bit k-means": Case(Native, partial(KMeansQuantizer, bits=3)),
    "compressed-tensors W4A16": Case(lambda: Checkpoint(CompressedTensors()), _integers(4)),
    "compressed-tensors W8A16": Case(lambda: Checkpoint(CompressedTensors()), _integers(8, "per_channel")),
    "compressed-tensors W8A8": Case(lambda: Checkpoint(CompressedTensors()), _integers(8, "per_channel"), TOKEN),
    "compressed-tensors W4A8": Case(lambda: Checkpoint(CompressedTensors()), _integers(4, "per_channel"), TOKEN),
    "compressed-tensors FP8": Case(lambda: Checkpoint(CompressedTensors()), FP8, FP8_TOKEN),
    "compressed-tensors NVFP4": Case(lambda: Checkpoint(CompressedTensors()), NVFP4Quantizer, dtype="bfloat16"),
    "bitsandbytes NF4": Case(lambda: Checkpoint(BitsAndBytes()), NF4),
    "LLM.int8": Case(lambda: Checkpoint(LlmInt8()), _integers(8, "per_channel"), TOKEN),
    "GGUF Q4_0": Case(Gguf, _integers(4, **HALF)),
    "GGUF Q8_0": Case(Gguf, _integers(8, **HALF)),
    "GGUF MXFP4": Case(Gguf, MicroscalingQuantizer),
    "ONNX int4": Case(Onnx, _integers(4)),
    "ONNX int8": Case(Onnx, _integers(8, "per_channel")),
    "GPTQ int4": Case(lambda: Checkpoint(Gptq()), _integers(4)),
    "AWQ uint4": Case(lambda: Checkpoint(Awq()), _integers(4, symmetric=False)),
    "ModelOpt FP8": Case(lambda: Checkpoint(ModelOpt()), FP8, FP8_TOKEN),
}


WRITERS = {"native": Native(), "gptq": Checkpoint(Gptq()), "compressed_tensors": Checkpoint(CompressedTensors())}


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def in_its_engine(title: str) -> dict[str, Any]:
    """SmolLM2, rounded, exported, read back and loaded by its engine; what `parity.json` holds."""
    case = CASES[title]
    loaded = load_smollm2("~/.cache/lightning-qat", case.dtype)
    ids = torch.tensor(loaded.tokenizer((ROOT / "docs" / "architecture.md").read_text())["input_ids"][:1024]).view(
        4, -1
    )
    model = qat.prepare(loaded.model.eval(), qat.Scheme(weight=case.weight, input=case.input))
    probe = Probe(ids, _logits(model, ids))
    packed, target = qat.convert(model), case.target()
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        folder = target.write(packed, Path(place) / "model", loaded.tokenizer)
        seconds = time.perf_counter() - start
        report = check_shipped(target, folder, packed, target.read(folder), probe, lambda model: _logits(model, ids))
    return {"export": title, "dtype": case.dtype, "seconds_to_write": seconds} | report


def billion() -> nn.Module:
    """A packed 4-bit model of the shape of Llama-3.2-1B, its numbers random, layer by layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.1, 0.1)
    model.tie_weights()
    return qat.convert(qat.prepare(model, qat.Scheme(weight=_integers(4, "per_group_128"))))


def write_billion(target: str) -> dict[str, Any]:
    """What writing it takes, in this process: the peak of resident memory beside what was resident before."""
    model = billion()
    size = tensor_bytes(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        WRITERS[target].write(model, Path(place) / "model")
        seconds = time.perf_counter() - start
    extra = _resident("VmHWM") - before
    return {
        "export": f"a billion parameters as {target}", "model_gib": size / GIB, "extra_gib": extra / GIB,
        "peak_of_the_model": (size + extra) / size, "seconds_to_write": seconds,
    }  # fmt: skip


def _resident(field: str) -> int:
    """Bytes by /proc: VmRSS now, VmHWM the peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def in_a_process(target: str) -> dict[str, Any]:
    """`write_billion` in a process of its own, whose memory nothing else has used."""
    command = [sys.executable, "-m", "benchmarks.export", "--write-billion", target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def mutated(name: str, count: int) -> dict[str, Any]:
    """Reads mutated files of a target; anything but a model or an InputError ends the command."""
    with tempfile.TemporaryDirectory() as place:
        return {"export": f"mutated files of {name}", "mutations": count, **fuzz(name, count, seed=0, work=Path(place))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=1200, help="of the files of each target")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/export.jsonl"), help="rows of a run that was stopped"
    )
    parser.add_argument("--write-billion", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_billion:
        print(json.dumps(write_billion(options.write_billion)))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {title: partial(in_its_engine, title) for title in CASES}
    parts |= {
        f"a billion parameters as {name}": partial(in_a_process, name)
        for name in ("native", "gptq", "compressed_tensors")
    }
    parts |= {f"mutated files of {name}": partial(mutated, name, options.mutations) for name in TARGETS}
    done = {row["export"] for row in rows_so_far(options.work)}
    for title, measure in parts.items():
        if title not in done:
            keep_row(options.work, measure())
    packages = ("compressed-tensors", "bitsandbytes", "gguf", "onnx", "onnxruntime")
    record("export", "python -m benchmarks.export", list(rows_so_far(options.work)), packages)
    options.work.unlink()


if __name__ == "__main__":
    main()
