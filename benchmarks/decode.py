"""How fast a packed Llama generates, beside the same model in bf16.

    python -m benchmarks.decode                     needs a GPU of 80 GB; writes results/decode.json; resumes
    python -m benchmarks.decode --models 8b --formats int4-g64 --contexts 512
    python -m benchmarks.decode --tiny              the same code on a model of toy size, on any machine; writes nothing

`8b` has the shape of Llama 3 8B (hidden 4096, 32 layers, 128 256 tokens, untied), `13b` that of LLaMA 13B, and
`13b-structured` what is left of it without 80 % of its heads and channels, beside the whole in bf16. Weights are
random. Linear layers of the blocks have the format, the embedding and the head 8 bits and a scale for every row; norms
are bf16. All arms decode one token after the other for one sequence into a static cache, the model compiled, a step
recorded as a CUDA graph; `tokens_per_s` is the median of five runs of 20 steps from `context` tokens on. A packed model
is measured only if its logits agree with those of the model before packing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import qat
from benchmarks.record import commit, kept, record
from benchmarks.train_step import EIGHT, TINY
from qat.nn import PackedTensor
from qat.quantizers import MinMaxQuantizer, TableQuantizer

_INT8 = partial(MinMaxQuantizer, bits=8, granularity="per_channel")
BF16 = "bf16"
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "vocab_size": 32000}
_13B |= {"num_attention_heads": 40, "head_dim": 128, "tie_word_embeddings": False}
MODELS = {"8b": EIGHT | {"num_hidden_layers": 32}, "13b": _13B}
# A fifth of the heads, and of the channels the nearest multiple of 128.
MODELS["13b-structured"] = _13B | {"num_attention_heads": 8, "intermediate_size": 2816}
_TOY = "toy"
_CONFIGS = MODELS | {_TOY: TINY}
FORMATS = {
    "int4-g64": partial(MinMaxQuantizer, bits=4, granularity="per_group_64"),
    "nf4-g64": partial(TableQuantizer, family="nf", bits=4, granularity="per_group_64", scale_dtype="bfloat16"),
    "int3-g64": partial(MinMaxQuantizer, bits=3, granularity="per_group_64"),
    "int2-g64": partial(MinMaxQuantizer, bits=2, granularity="per_group_64"),
}
_GATE = 2e-2
_STEPS, _RUNS, _WARM_UP = 20, 5, 3
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512], help="tokens before the timed ones")
    parser.add_argument("--tiny", action="store_true", help="toy size, on any machine")
    parser.add_argument("--work", type=Path, default=Path("outputs/decode"), help="where figures are kept")
    options = parser.parse_args()
    if options.tiny:
        options.models, options.contexts = [_TOY], [64]
    elif not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU; --tiny runs the same code on a small model anywhere.")

    def figures(model: str, format: str) -> Row:
        arm = partial(measure, model, format, options.contexts)
        name = "-".join([model, format, *map(str, options.contexts), commit()])
        found: Row = arm() if options.tiny else kept(options.work / f"{name}.json", arm)
        return found

    rows = []
    for model in options.models:
        reference = figures(model.removesuffix("-structured"), BF16)
        for format in options.formats:
            rows += rows_of(model, format, reference, figures(model, format))
            print(rows[-1], flush=True)
    if not options.tiny:
        record("decode", _command(options), rows, ("triton",))


def _command(options: argparse.Namespace) -> str:
    named = {name: getattr(options, name) for name in ("models", "formats", "contexts")}
    words = (f"--{name} {' '.join(map(str, values))}" for name, values in named.items())
    return " ".join(["python -m benchmarks.decode", *words])


def rows_of(model: str, format: str, reference: Row, found: Row) -> list[Row]:
    """One for each context."""
    rows = []
    for context, speed in found["tokens_per_s"].items():
        row: Row = {"model": model, "format": format, "batch": 1, "context": int(context)}
        row |= {"tokens_per_s": speed, "bf16_tokens_per_s": reference["tokens_per_s"][context]}
        row |= {"speedup": speed / row["bf16_tokens_per_s"], "rel_error": found["rel_error"]}
        rows.append(row | {"weights_gib": found["weights_gib"], "bf16_weights_gib": reference["weights_gib"]})
    return rows


def measure(name: str, format: str, contexts: list[int]) -> Row:
    """Tokens a second by context and the size of the weights of one arm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**_CONFIGS[name], max_position_embeddings=2**17)
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    error = 0.0 if format == BF16 else packed(model, format)
    row: Row = {"rel_error": error, "weights_gib": bytes_of(model) / 2**30}
    backend = "aot_eager" if name == _TOY else "inductor"
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    speeds = {str(context): tokens_per_s(model, compiled, context) for context in contexts}
    return row | {"tokens_per_s": speeds}


def bytes_of(model: nn.Module) -> int:
    """What weights, scales and tables of `model` take, in the order of kernels too; what is shared counts once."""
    packed = (module for module in model.modules() if isinstance(module, PackedTensor))
    kernels = (tensor for module in packed for tensor in module.kernel_tensors())
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *kernels)}
    return sum(held.values())


@torch.no_grad()
def packed(model: nn.Module, format: str) -> float:
    """Pack `model` in place; the relative error of its logits to those before.

    Raises:
        SystemExit: if it is not one of rounding.
    """
    rules = {"ends": qat.Rule(("lm_head", "*embed_tokens"), weight=_INT8)}
    scheme = qat.Scheme(weight=FORMATS[format], rules=rules, head=True, embedding=True, kv=None)
    qat.prepare(model, scheme)
    tokens = random_tokens(model, 16)
    expected = model(tokens, use_cache=False).logits.float()
    found = qat.convert(model)(tokens, use_cache=False).logits.float()
    error = float((found - expected).norm() / expected.norm())
    if not error < _GATE:
        raise SystemExit(f"{format}: logits of the packed model differ by {error:.2e}. Nothing is measured.")
    return error


def random_tokens(model: Any, count: int) -> Tensor:
    """`[1, count]`, the same for every arm."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, count), generator=generator).to(model.device)


@torch.no_grad()
def tokens_per_s(model: Any, compiled: Any, context: int) -> float:
    """Of greedy decoding after `context` tokens, which `model` reads."""
    cache = StaticCache(config=model.config, max_cache_len=context + _WARM_UP + _RUNS * _STEPS)
    model(random_tokens(model, context), past_key_values=cache, logits_to_keep=1)
    token = random_tokens(model, 1)

    def step() -> None:
        logits = compiled(token, past_key_values=cache).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    run = recorded(step, model.device)
    times = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        for _ in range(_STEPS):
            run()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return _STEPS / statistics.median(times)


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph; itself on a CPU. It ran before, so that everything is compiled."""
    if device.type == "cpu":
        step()
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


if __name__ == "__main__":
    main()
