"""Exports in the engines that serve them: `make test-engines`, or `python -m tests.engines.run vllm gptqmodel`.

Each engine has an environment of its own under `.engines/`, made when it is first asked for. One that cannot be had is
reported by name, and the command fails.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qat
from lightning_modules.models import load_smollm2
from qat.export.checkpoint import Checkpoint
from qat.export.gguf.target import Gguf
from qat.export.layouts.gptq import Gptq
from qat.export.targets import Target
from qat.quantizers import LSQQuantizer, MicroscalingQuantizer, MinMaxQuantizer
from tests.conftest import tiny_tokenizer
from tests.engines.environments import ENGINES, Unavailable, ask
from tests.export.exported import MODELS

# Likeliest tokens of each position that are compared.
COUNT = 20
ROOT = Path(__file__).parents[2]


class Case(NamedTuple):
    """What is exported, and to which engine.

    engine, target: who reads what.
    weight: the quantizer of weights.
    most_kl: what the engine may diverge, in nats a token: it computes in bfloat16 with sums in another order, or
        quantizes activations on its own.
    """

    engine: str
    target: Target
    weight: Callable[..., Any]
    most_kl: float


INT4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
HALF = {"granularity": "per_group_32", "scale_dtype": "float16"}
UINT4 = partial(MinMaxQuantizer, bits=4, granularity="per_group_32", symmetric=False)
CASES = {
    "GPTQ int4 in vLLM": Case("vllm", Checkpoint(Gptq()), INT4, 1e-3),
    "GPTQ int4 in GPTQModel": Case("gptqmodel", Checkpoint(Gptq()), INT4, 1e-3),
    "GPTQ uint4 in GPTQModel": Case("gptqmodel", Checkpoint(Gptq()), UINT4, 1e-3),
    "GGUF Q4_0 in llama.cpp": Case("llama_cpp", Gguf(), partial(LSQQuantizer, bits=4, **HALF), 1e-2),
    "GGUF Q8_0 in llama.cpp": Case("llama_cpp", Gguf(), partial(MinMaxQuantizer, bits=8, **HALF), 1e-2),
    "GGUF MXFP4 in llama.cpp": Case("llama_cpp", Gguf(), MicroscalingQuantizer, 1e-2),
}


def models() -> Iterator[tuple[str, nn.Module, Any, Tensor]]:
    """Every model in bfloat16, with its tokenizer and tokens to read."""
    loaded = load_smollm2("~/.cache/lightning-qat", "bfloat16")
    ids = loaded.tokenizer((ROOT / "docs" / "architecture.md").read_text())["input_ids"][:512]
    yield "SmolLM2-135M", loaded.model, loaded.tokenizer, torch.tensor(ids).view(2, 256)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        yield name, model, tiny_tokenizer(), torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(1))


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
def run(case: Case, model: nn.Module, tokenizer: Any, ids: Tensor) -> tuple[str, Found]:
    """Quantize a copy of `model`, export it, and ask the engine."""
    import copy

    packed: Any = qat.convert(qat.prepare(copy.deepcopy(model).eval(), qat.Scheme(weight=case.weight)))
    ours = packed(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with tempfile.TemporaryDirectory() as place:
        folder = case.target.write(packed, Path(place) / "model", tokenizer)
        request = {"folder": str(folder), "ids": ids.tolist(), "count": COUNT, "dtype": "bfloat16"}
        answer = ask(case.engine, request)
    return answer["version"], compare(ours, answer["log_p"], ids)


def main() -> int:
    """All cases of the engines that are asked for; 1 if one failed or an engine is absent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(ENGINES), help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--models", nargs="+", default=None, help="names of the models, all if left out")
    options = parser.parse_args()
    table, failures = Table(title="exports in their engines"), []
    for heading in ("export", "model", "engine", "KL", "same top-1", "delta NLL"):
        table.add_column(heading)
    for name, model, tokenizer, ids in models():
        if options.models and name not in options.models:
            continue
        for title, case in CASES.items():
            if case.engine not in options.engines:
                continue
            try:
                version, found = run(case, model, tokenizer, ids)
            except (Unavailable, RuntimeError, qat.InputError) as error:
                failures.append(f"{title}, {name}: {error}")
                print(f"FAILED {failures[-1]}", flush=True)
                continue
            figures = f"{found.kl:.1e}", f"{found.top1_agreement:.2%}", f"{found.delta_nll:+.1e}"
            print(f"{title}, {name}: KL {figures[0]}, same top-1 {figures[1]}", flush=True)
            table.add_row(title, name, version, *figures)
            if found.kl > case.most_kl:
                failures.append(f"{title}, {name}: KL {found.kl:.1e}, at most {case.most_kl:.0e}")
    Console(width=140).print(table)
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
