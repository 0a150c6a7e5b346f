"""Exports in the engines that serve them: `make test-engines`, or `python -m tests.engines.run vllm gptqmodel`.

Each engine has an environment of its own under `.engines/`, made when it is first asked for. One that cannot be had is
reported by name, and the command fails.
"""

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import qat
from benchmarks.record import record
from lightning_modules.models import load_smollm2
from qat.export.checkpoint import Checkpoint
from qat.export.gguf.target import Gguf
from qat.export.layouts import Awq, CompressedTensors, Gptq
from qat.export.targets import Target
from qat.quantizers import LSQQuantizer, MicroscalingQuantizer, MinMaxQuantizer, NoQuantizer
from tests.conftest import tiny_tokenizer
from tests.engines.environments import ENGINES, Unavailable, ask

# Nats a token. Sums in bfloat16 in another order diverge by 0.0014 on SmolLM2: so does this model in full precision
# between vLLM and transformers, and its dequantized weights in vLLM. The integer kernels of vLLM for CPUs diverge by
# 0.023 from those same weights, alike for GPTQ and compressed-tensors.
BFLOAT16_KL, VLLM_KL = 3e-3, 5e-2
# Likeliest tokens of each position that are compared.
COUNT = 20
ROOT = Path(__file__).parents[2]


class Case(NamedTuple):
    """What is exported, and to which engine.

    engine, target: who reads what.
    weight, input: quantizers.
    most_kl: what the engine may diverge, in nats a token: it computes in bfloat16 with sums in another order, or
        quantizes activations on its own.
    """

    engine: str
    target: Target
    weight: Callable[..., Any]
    input: Callable[..., Any] | None
    most_kl: float


INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
UINT4 = partial(MinMaxQuantizer, bits=4, granularity="per_group_32", symmetric=False)
INT8 = partial(MinMaxQuantizer, bits=8, granularity="per_channel")
TOKEN = partial(MinMaxQuantizer, bits=8, granularity="per_token", scale_dtype="float32")
HALF = {"granularity": "per_group_32", "scale_dtype": "float16"}
GPTQ, AWQ, PACKED = Checkpoint(Gptq()), Checkpoint(Awq()), Checkpoint(CompressedTensors())
CASES = {
    "GPTQ int4 in vLLM": Case("vllm", GPTQ, INT4, None, VLLM_KL),
    "AWQ uint4 in vLLM": Case("vllm", AWQ, UINT4, None, VLLM_KL),
    "compressed-tensors W4A16 in vLLM": Case("vllm", PACKED, INT4, None, VLLM_KL),
    "compressed-tensors W8A8 in vLLM": Case("vllm", PACKED, INT8, TOKEN, VLLM_KL),
    "GPTQ int4 in GPTQModel": Case("gptqmodel", GPTQ, INT4, None, BFLOAT16_KL),
    "GPTQ uint4 in GPTQModel": Case("gptqmodel", GPTQ, UINT4, None, BFLOAT16_KL),
    "AWQ uint4 in GPTQModel": Case("gptqmodel", AWQ, UINT4, None, BFLOAT16_KL),
    "GGUF Q4_0 in llama.cpp": Case("llama_cpp", Gguf(), partial(LSQQuantizer, bits=4, **HALF), None, 1e-2),
    "GGUF Q8_0 in llama.cpp": Case("llama_cpp", Gguf(), partial(MinMaxQuantizer, bits=8, **HALF), None, 1e-2),
    "GGUF MXFP4 in llama.cpp": Case("llama_cpp", Gguf(), MicroscalingQuantizer, None, 1e-2),
}
# Heads of 32 numbers, the fewest that vLLM has on a CPU.
SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


class Read(NamedTuple):
    """A model in bfloat16, its tokenizer, and token ids `[batch, tokens]` to read."""

    model: nn.Module
    tokenizer: Any
    ids: Tensor


def smollm2() -> Read:
    """SmolLM2, reading this project's own documentation."""
    loaded = load_smollm2("~/.cache/lightning-qat", "bfloat16")
    ids = loaded.tokenizer((ROOT / "docs" / "architecture.md").read_text())["input_ids"][:512]
    return Read(loaded.model, loaded.tokenizer, torch.tensor(ids).view(2, 256))


def tiny(make: Callable[[], nn.Module]) -> Read:
    """A random model, reading random tokens."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return Read(model, tiny_tokenizer(), torch.randint(0, SIZES["vocab_size"], (2, 32)))


MODELS: dict[str, Callable[[], Read]] = {
    "SmolLM2-135M": smollm2,
    "tiny Llama": lambda: tiny(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))),
    "tiny Qwen2": lambda: tiny(lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))),
    "tiny GPT-2": lambda: tiny(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=128, n_layer=2, n_head=4))
    ),
}


class Found(NamedTuple):
    """What an engine computed beside the packed model.

    kl: KL(ours || engine) over our likeliest tokens and all others as one, nats a token.
    top1_agreement: share of the positions with the same likeliest token.
    delta_nll: mean negative log likelihood of the engine minus ours, over the tokens that both list.
    """

    kl: float
    top1_agreement: float
    delta_nll: float


def compare(ours: Tensor, theirs: list[list[dict[str, float]]], ids: Tensor) -> Found:
    """Compare log probabilities `[batch, tokens, vocabulary]` with those of the likeliest tokens by an engine."""
    kl = same = nll = count = listed = 0
    for row, found, tokens in zip(ours[:, :-1], theirs, ids[:, 1:], strict=True):
        for log_p, other, token in zip(row, found, tokens.tolist(), strict=True):
            kl += _kl(log_p, other)
            same += int(log_p.argmax()) == int(max(other, key=lambda key: other[key]))
            count += 1
            if str(token) in other:
                nll += float(log_p[token]) - other[str(token)]
                listed += 1
    return Found(kl / count, same / count, nll / max(listed, 1))


def _kl(log_p: Tensor, other: dict[str, float]) -> float:
    """Over the tokens that the engine lists, and all others together."""
    tokens = torch.tensor([int(token) for token in other])
    p, q = log_p[tokens].double().exp(), torch.tensor(list(other.values()), dtype=torch.float64).exp()
    rest_p, rest_q = max(1 - float(p.sum()), 1e-12), max(1 - float(q.sum()), 1e-12)
    return float((p * (p / q).log()).sum()) + rest_p * math.log(rest_p / rest_q)


@torch.no_grad()
def run(case: Case, read: Read) -> dict[str, Any]:
    """Quantize a copy of the model, export it, and ask the engine; a row of the report."""
    scheme = qat.Scheme(weight=case.weight, input=case.input or NoQuantizer)
    packed: Any = qat.convert(qat.prepare(copy.deepcopy(read.model).eval(), scheme))
    ours = packed(input_ids=read.ids, use_cache=False).logits.float().log_softmax(-1)
    with tempfile.TemporaryDirectory() as place:
        folder = case.target.write(packed, Path(place) / "model", read.tokenizer)
        request = {"folder": str(folder), "ids": read.ids.tolist(), "count": COUNT, "dtype": "bfloat16"}
        answer = ask(case.engine, request)
    found = compare(ours, answer["log_p"], read.ids)
    return {"engine": answer["version"], **found._asdict(), "most_kl": case.most_kl, "passed": found.kl <= case.most_kl}


def attempt(title: str, name: str, read: Read) -> dict[str, Any]:
    """`run`, or why there is nothing to run: an engine that cannot be had, or a grid or model that is refused."""
    try:
        found = run(CASES[title], read)
    except qat.InputError as error:
        found = {"refused": str(error), "passed": True}
    except (Unavailable, RuntimeError) as error:
        found = {"failed": str(error), "passed": False}
    print(f"{title}, {name}: {found}", flush=True)
    return {"export": title, "model": name} | found


def table_of(rows: list[dict[str, Any]]) -> Table:
    """What is shown at the end."""
    table = Table(title="exports in their engines")
    for heading in ("export", "model", "engine", "KL", "same top-1", "delta NLL", ""):
        table.add_column(heading)
    for row in rows:
        figures = ["", "", "", row.get("refused", row.get("failed", "")).splitlines()[:1]]
        if "kl" in row:
            figures = [f"{row['kl']:.1e}", f"{row['top1_agreement']:.2%}", f"{row['delta_nll']:+.1e}", []]
        told = "" if row["passed"] and "kl" in row else " ".join(figures[3])[:60] or "differs"
        table.add_row(row["export"], row["model"], row.get("engine", ""), *figures[:3], told)
    return table


def main() -> int:
    """All cases of the engines that are asked for; 1 if one differs or fails, or its engine is absent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(ENGINES), help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    asked = [title for title, case in CASES.items() if case.engine in options.engines]
    rows = [attempt(title, name, read) for name in options.models for read in [MODELS[name]()] for title in asked]
    Console(width=160).print(table_of(rows))
    if asked == list(CASES) and options.models == list(MODELS):
        record("export_engines", "python -m tests.engines.run", rows, ("compressed-tensors", "gguf"))
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
