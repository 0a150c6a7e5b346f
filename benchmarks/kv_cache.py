"""What a quantized KV cache costs in perplexity, with and without training, and what it saves in memory.

    python -m benchmarks.kv_cache --texts TEXTS      every arm, and results/kv_cache.json

Texts, model and training are those of benchmarks/grids.py. Arms: the model trained in full precision (fp) with nothing
but its cache quantized; that model with weights and activations rounded too; W4A8 with the cache quantized while
training, on the same tokens; and W4A8 trained without that, its cache quantized afterwards. Then the memory that a
cache of 8k and 32k tokens takes, for the layers and heads of a 1-billion-parameter Llama in bf16, as allocated and as
counted.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import qat
from benchmarks.recipe import BATCH, LENGTH, MODEL, device, fit, load, perplexity
from benchmarks.record import record
from benchmarks.texts import windows
from qat.nn.kv_cache import QuantizedCache
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, TableQuantizer
from qat.transforms import KVCache

TOKEN = partial(MinMaxQuantizer, granularity="per_token", symmetric=False)
KIVI_KEY = partial(MinMaxQuantizer, bits=2, granularity="per_block_32x1", symmetric=False)
KIVI_VALUE = partial(MinMaxQuantizer, bits=2, granularity="per_group_32", symmetric=False)
NF4 = partial(TableQuantizer, granularity="per_token", scale_dtype="bfloat16")
LAYOUTS = {
    "kv8": KVCache(partial(TOKEN, bits=8), partial(TOKEN, bits=8)),
    "kv4": KVCache(partial(TOKEN, bits=4), partial(TOKEN, bits=4)),
    "kv4-nf4": KVCache(NF4, NF4),
    "kv2": KVCache(partial(TOKEN, bits=2), partial(TOKEN, bits=2)),
    "kv2-kivi": KVCache(KIVI_KEY, KIVI_VALUE, window=32),
}
W4A8 = {
    "weight": partial(LSQQuantizer, bits=4, granularity="per_group_64"),
    "input": partial(MinMaxQuantizer, bits=8, granularity="per_token"),
}
SCHEMES = {name: qat.Scheme(kv=kv) for name, kv in LAYOUTS.items()}
SCHEMES |= {"w4a8": qat.Scheme(**W4A8)}
SCHEMES |= {f"w4a8{name}": qat.Scheme(**W4A8, kv=LAYOUTS[name]) for name in ("kv4", "kv2-kivi")}
WITHOUT_CACHE = "w4a8"
TRAINED = (WITHOUT_CACHE, "w4a8kv4", "w4a8kv2-kivi")
FP = "fp"
RATE = 2e-5
# Layers, key and value heads, and their size, of a Llama of 1 B parameters.
SHAPE = {"num_hidden_layers": 16, "num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="lengths to measure memory at")
    options = parser.parse_args()
    rows = accuracy(options) + [memory(layout, tokens) for tokens in options.tokens for layout in LAYOUTS]
    record("kv_cache", f"python -m benchmarks.kv_cache --texts TEXTS --steps {options.steps}", rows)


def accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Perplexity of every arm."""
    train, val = windows(options.texts, LENGTH)
    shared = {"model": MODEL, "text": "wiki106.val", "learning_rate": RATE, "steps": options.steps}
    shared |= {"tokens": options.steps * BATCH * LENGTH}
    rows: list[dict[str, Any]] = []

    def add(scheme: str, arm: str, model: nn.Module) -> None:
        rows.append({"scheme": scheme, "arm": arm, "ppl": perplexity(model, val)} | shared)
        print(rows[-1], flush=True)

    tuned = fit(load(), RATE, train, options.steps)
    trained = {name: fit(qat.prepare(load(), SCHEMES[name]), RATE, train, options.steps) for name in TRAINED}
    add(FP, "trained", tuned)
    for name, scheme in SCHEMES.items():
        add(name, "rounded", qat.prepare(load(tuned.state_dict()), scheme))
    for name, model in trained.items():
        add(name, "trained", model)
    for name in (name for name in trained if name != WITHOUT_CACHE):
        model = qat.prepare(load(), SCHEMES[name])
        # What the cache is quantized with has no parameters, and is all that is missing.
        model.load_state_dict(trained[WITHOUT_CACHE].state_dict(), strict=False)
        add(name, "trained without the cache", model)
    return rows


@torch.no_grad()
def memory(layout: str, tokens: int) -> dict[str, Any]:
    """Fill a cache of every layer, 1024 tokens at a time, in bf16; bytes beside those of transformers' own cache."""
    config = LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=8, **SHAPE)
    kv = LAYOUTS[layout]
    model = qat.prepare(LlamaForCausalLM(config).to(device()), qat.Scheme(kv=kv))
    plain_bytes = _fill(plain := DynamicCache(), tokens)
    del plain
    quantized_bytes = _fill(quantized := QuantizedCache(model), tokens)
    gib = 2**30
    return {
        "scheme": layout,
        "arm": "memory",
        "tokens": tokens,
        "cache_gib": quantized.nbytes / gib,
        "allocated_gib": None if quantized_bytes is None else quantized_bytes / gib,
        "bf16_gib": (plain_bytes or 2 * _elements(tokens) * 2) / gib,
        "ratio": (quantized_bytes or quantized.nbytes) / (plain_bytes or 2 * _elements(tokens) * 2),
    }


def _fill(cache: Any, tokens: int) -> int | None:
    """Bytes that the GPU has allocated more once `cache` is filled; None without a GPU."""
    gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if gpu else 0
    for begin in range(0, tokens, 1024):
        shape = (1, SHAPE["num_key_value_heads"], min(1024, tokens - begin), SHAPE["head_dim"])
        for layer in range(SHAPE["num_hidden_layers"]):
            cache.update(*(torch.randn(shape, device=device(), dtype=torch.bfloat16) for _ in range(2)), layer)
    return torch.cuda.memory_allocated() - before if gpu else None


def _elements(tokens: int) -> int:
    """Numbers that the keys of all layers are."""
    return tokens * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * SHAPE["head_dim"]


if __name__ == "__main__":
    main()
