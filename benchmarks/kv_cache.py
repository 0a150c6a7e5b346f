"""What a quantized KV cache costs in perplexity, with and without training, and what it saves in memory.

    python -m benchmarks.kv_cache --texts TEXTS      every arm, and results/kv_cache.json; a run that stopped goes on

Texts, model and training are those of benchmarks/grids.py. Arms: the model trained in full precision (fp) with nothing
but its cache quantized; that model with weights and activations rounded too; and W4A8 with the cache quantized while
training, on the same tokens. Then the memory that a cache of 8k and 32k tokens takes, for the layers and heads of a
1-billion-parameter Llama in bf16, as allocated and as counted.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import qat
from benchmarks.recipe import BATCH, LENGTH, MODEL, device, fit, load, perplexity, run_all
from benchmarks.record import record
from benchmarks.texts import windows
from qat.atomic import replaced_file
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
TRAINED = ("kv4", "kv2-kivi")
FP = "fp"
# Layers, key and value heads, and their size, of a Llama of 1 B parameters.
SHAPE = {"num_hidden_layers": 16, "num_key_value_heads": 8, "num_attention_heads": 32, "head_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/kv_cache"), help="where rows and the fp model are kept"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="lengths to measure memory at")
    parser.add_argument("--arm", help="run one arm in this process")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.arm:
        run(options.arm, options)
        return
    arms = ["w4a8", *(f"w4a8{layout}" for layout in TRAINED)]
    for some, jobs in (([FP], 1), (arms, options.jobs)):
        run_all("benchmarks.kv_cache", [arm for arm in some if not _rows(options.work, arm).is_file()], jobs)
    rows = [row for arm in (FP, *arms) for row in json.loads(_rows(options.work, arm).read_text())]
    rows += [memory(layout, tokens) for tokens in options.tokens for layout in LAYOUTS]
    record("kv_cache", f"python -m benchmarks.kv_cache --texts TEXTS --steps {options.steps}", rows)


def run(arm: str, options: argparse.Namespace) -> None:
    """Train one arm, and write its rows."""
    start = time.perf_counter()
    train, val = windows(options.texts, LENGTH)
    rows: list[dict[str, Any]] = []

    def add(scheme: str, figure: str, model: torch.nn.Module) -> None:
        rows.append({"scheme": scheme, "arm": figure, "ppl": perplexity(model, val)})

    if arm == FP:
        model = fit(load(), train, options.steps)
        add("fp", "fp", model)
        tuned = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        for layout, kv in LAYOUTS.items():
            add(layout, "rounded", qat.prepare(load(tuned), qat.Scheme(kv=kv)))
        for layout in TRAINED:
            add(f"w4a8{layout}", "rounded", qat.prepare(load(tuned), qat.Scheme(**W4A8, kv=LAYOUTS[layout])))
        add("w4a8", "rounded", qat.prepare(load(tuned), qat.Scheme(**W4A8)))
    else:
        kv = LAYOUTS.get(arm.removeprefix("w4a8"))
        add(arm, "trained", fit(qat.prepare(load(), qat.Scheme(**W4A8, kv=kv)), train, options.steps))
    shared = {"model": MODEL, "text": "wiki106.val", "steps": options.steps, "tokens": options.steps * BATCH * LENGTH}
    rows = [row | shared | {"seconds": time.perf_counter() - start} for row in rows]
    with replaced_file(_rows(options.work, arm)) as temporary:
        temporary.write_text(json.dumps(rows))
    print(rows, flush=True)


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


def _rows(work: Path, arm: str) -> Path:
    return work / f"{arm}.json"


if __name__ == "__main__":
    main()
