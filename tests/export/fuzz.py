"""Mutated exports: each is read, or refused by one InputError. `python -m tests.export.fuzz --count 10000`."""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from qat.errors import InputError
from qat.export.checkpoint import Checkpoint
from qat.export.gguf.target import Gguf
from qat.export.layouts import Awq, BitsAndBytes, CompressedTensors, Gptq, LlmInt8, ModelOpt
from qat.export.native import Native
from qat.export.onnx.target import Onnx
from qat.export.targets import Target
from qat.quantizers import LSQQuantizer, MinMaxQuantizer, NoQuantizer, TableQuantizer

INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
NF4 = partial(TableQuantizer, bits=4, granularity="per_group_32", double_quant=True)
FP8 = partial(MinMaxQuantizer, format="fp8_e4m3", granularity="per_channel", scale_dtype="float32")
INT8 = partial(MinMaxQuantizer, bits=8, granularity="per_channel")
TOKEN = partial(MinMaxQuantizer, bits=8, granularity="per_token", scale_dtype="float32")
FP8_TOKEN = partial(MinMaxQuantizer, format="fp8_e4m3", granularity="per_token", scale_dtype="float32")
# What writes, and the quantizers of weights and inputs.
TARGETS: dict[str, tuple[Target, Any, Any]] = {
    "native": (Native(), INT4, None),
    "gptq": (Checkpoint(Gptq()), INT4, None),
    "awq": (Checkpoint(Awq()), INT4, None),
    "compressed_tensors": (Checkpoint(CompressedTensors()), INT4, None),
    "bitsandbytes": (Checkpoint(BitsAndBytes()), NF4, None),
    "llm_int8": (Checkpoint(LlmInt8()), INT8, TOKEN),
    "modelopt": (Checkpoint(ModelOpt()), FP8, FP8_TOKEN),
    "onnx": (Onnx(), INT4, None),
    "gguf": (Gguf(), partial(INT4, scale_dtype="float16"), None),
}
# What a number or a word in a JSON file is replaced by.
_VALUES = (None, -1, 0, 1, 3, 2**31, 1e300, "", "x", "../x", [], {}, True)
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}


def written(name: str, folder: Path) -> Path:
    """A tiny model as the target `name` writes it."""
    target, weight, input = TARGETS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16)).eval()
    return target.write(
        qat.convert(qat.prepare(model, qat.Scheme(weight=weight, input=input or NoQuantizer))), folder / name
    )


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of `folder`, and say how."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.name != "generation_config.json"))
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(json.dumps(_restructured(json.loads(path.read_text()), rng)))
        return f"{path.name}: a value"
    kind = rng.choice(list(_BYTES))
    data = path.read_bytes()
    # Half of the time where the header lies.
    place = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))
    path.write_bytes(_BYTES[kind](data, place, rng))
    return f"{path.name}: {kind}"


_BYTES: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "a bit": lambda data, at, rng: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
    "bytes": lambda data, at, rng: data[:at] + rng.randbytes(8) + data[at + 8 :],
    "cut off": lambda data, at, rng: data[:at],
    "cut out": lambda data, at, rng: data[:at] + data[at + rng.randrange(1, 64) :],
    "put in": lambda data, at, rng: data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:],
    "zeros": lambda data, at, rng: data[:at] + bytes(16) + data[at + 16 :],
}


def _restructured(tree: Any, rng: random.Random) -> Any:
    """`tree` with one value replaced, left out, or renamed."""
    if isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.8:
            return tree | {key: _restructured(tree[key], rng)}
        change = rng.random()
        if change < 0.2:
            return {name: value for name, value in tree.items() if name != key}
        return tree | ({f"{key}_": tree[key]} if change < 0.3 else {key: rng.choice(_VALUES)})
    if isinstance(tree, list) and tree:
        place = rng.randrange(len(tree))
        return [*tree[:place], _restructured(tree[place], rng), *tree[place + 1 :]]
    return rng.choice(_VALUES)


def outcome(folder: Path) -> str:
    """`read` or `refused`. Anything but an InputError is raised."""
    try:
        qat.load(folder)
    except InputError:
        return "refused"
    return "read"


def fuzz(name: str, count: int, seed: int, work: Path) -> Counter[str]:
    """Read `count` mutations of what the target `name` writes.

    Raises:
        AssertionError: naming the mutation, if it was neither read nor refused.
    """
    original, found, rng = written(name, work), Counter[str](), random.Random(seed)
    for number in track(range(count), description=name, transient=True):
        folder = work / "mutated"
        shutil.copytree(original, folder)
        changed = mutate(folder, rng)
        try:
            found[outcome(folder)] += 1
        except Exception as error:
            kept = Path(tempfile.mkdtemp(prefix="fuzz_")) / "mutated"
            shutil.copytree(folder, kept)
            raise AssertionError(f"{name}, mutation {number} of seed {seed} ({changed}), kept in {kept}") from error
        shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutations, shared among the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    options = parser.parse_args()
    for target in options.targets:
        with tempfile.TemporaryDirectory() as work:
            print(target, dict(fuzz(target, -(-options.count // len(options.targets)), options.seed, Path(work))))
