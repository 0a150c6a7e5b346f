"""A full fine-tune of a model of one billion parameters with 3-bit codebooks, against the same in bf16.

    python -m benchmarks.kmeans_1b           needs a GPU of 40 GiB; writes results/kmeans_1b.json
    python -m benchmarks.kmeans_1b --tiny    the same code on a model of toy size, on any machine; writes nothing

The model is a Llama of random weights (hidden 2048, 16 layers, 128 256 tokens, tied embeddings) in bf16, trained by
torch's fused AdamW at 4 x 2048 tokens a step. Every linear layer but the head has one codebook a row; it is refreshed
after every step in one arm, never in the other. Each arm is a process of its own. Before any timing the gradients of a
layer are compared with those of the unfused definition.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from benchmarks.record import record
from lightning_modules.callbacks.codebooks import refresh
from qat.numerics.functional import fake_quantize
from qat.quantizers import KMeansQuantizer
from qat.transforms import quant_layers

REFERENCE = "bf16"
ARMS = (REFERENCE, "ours-kmeans3-row", "ours-kmeans3-row-norefresh")
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy size, on any machine")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of an arm")
    parser.add_argument("--arm", choices=ARMS, help="measure one arm in this process and print it as JSON")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.tiny, options.steps)))
        return
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU; --tiny runs the same code on a small model anywhere.")
    found = {arm: in_a_process(arm, options.tiny, options.steps) for arm in ARMS}
    rows = summary(found, "toy" if options.tiny else "llama-1b-random")
    for row in rows:
        print(row)
    if not options.tiny:
        record("kmeans_1b", f"python -m benchmarks.kmeans_1b --steps {options.steps}", rows)


def in_a_process(arm: str, tiny: bool, steps: int) -> dict[str, float]:
    """Measure `arm` in a fresh process, so that peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.kmeans_1b", "--arm", arm, "--steps", str(steps)]
    output = subprocess.run(command + ["--tiny"] * tiny, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def summary(found: dict[str, dict[str, float]], model: str) -> list[dict[str, Any]]:
    """One row for each arm, relative to bf16."""
    reference = found[REFERENCE]
    return [
        {"arm": arm, "model": model, "reference": REFERENCE}
        | measured
        | {
            "speed_ratio": measured["tokens_per_s"] / reference["tokens_per_s"],
            "memory_ratio": measured["peak_gib"] / reference["peak_gib"],
        }
        for arm, measured in found.items()
    ]


def measure(arm: str, tiny: bool, steps: int) -> dict[str, float]:
    """Tokens a second, peak memory, seconds to fit all codebooks, and the share of a step that refreshing takes."""
    device = torch.device("cpu" if tiny else "cuda")
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if tiny else LARGE), tie_word_embeddings=True, max_position_embeddings=2048)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    parameters = sum(p.numel() for p in model.parameters())
    fit_seconds = 0.0
    if arm != REFERENCE:
        start = now(device)
        qat.prepare(model, qat.Scheme(weight=partial(KMeansQuantizer, bits=3)))
        fit_seconds = now(device) - start
        check(next(layer for _, layer in quant_layers(model)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    size = (2, 64) if tiny else (4, 2048)
    ids = torch.randint(config.vocab_size, size, device=device)
    seconds, refreshing = [], []
    for step in range(steps + 3):
        if step == 3 and not tiny:
            torch.cuda.reset_peak_memory_stats()
        start = now(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained = now(device)
        if arm == "ours-kmeans3-row":
            refresh(model)
        end = now(device)
        seconds.append(end - start)
        refreshing.append((end - trained) / (end - start))
    return {
        "parameters": parameters,
        "tokens_per_s": ids.numel() / statistics.median(seconds[3:]),
        "peak_gib": peak_gib(device),
        "fit_seconds": fit_seconds,
        "refresh_share": statistics.median(refreshing[3:]),
    }


def peak_gib(device: torch.device) -> float:
    """Of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def now(device: torch.device) -> float:
    """Seconds, once the device has done everything so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check(layer: nn.Module) -> None:
    """The layer's gradients are those of the definition."""
    x, g = (torch.randn(8, n, device=layer.weight.device) for n in (layer.in_features, layer.out_features))
    weight, quantizer = layer.weight.detach().float().requires_grad_(), layer.weight_quantizer
    leaves = [weight, quantizer.codebook]
    plain = fake_quantize(weight, quantizer.qparams(weight), quantizer.format, quantizer.granularity)
    expected = torch.autograd.grad(nn.functional.linear(x, plain), leaves, g)
    for a, b in zip(torch.autograd.grad(quantizer.linear(x, weight, None), leaves, g), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


if __name__ == "__main__":
    main()
