"""What quantization-aware training costs on a GPU: tokens a second and peak memory of a full fine-tune.

    python -m benchmarks.train_step          needs a GPU of 40 GiB; writes results/train_step.json; resumes
    python -m benchmarks.train_step --shapes 1b 8b4
    python -m benchmarks.train_step --shapes 8b 8b-1      needs a GPU of 141 GB
    python -m benchmarks.train_step --tiny   the same code on a model of toy size, on any machine; writes nothing

The model `1b` is a Llama of one billion parameters (hidden 2048, 16 layers, 128 256 tokens, tied embeddings), `8b4`
four layers of eight billion (hidden 4096, untied), with random weights in bf16, trained at 4 x 2048 tokens a step by
torch's fused AdamW. `8b` is all 32 layers, trained as one GPU can: AdamW with a state of 8 bits (bitsandbytes), and
blocks that are computed again for their backward pass; `8b-1` is that at 1 x 2048 tokens. All arms of a kind share
everything but the quantizers: the loss by `module.loss` (--loss), and blocks that are eager, compiled as
`module.compile=inductor` does it, or recorded as CUDA graphs too (`graphs`, `module.cuda_graphs`). `ours-w4a8`
and `torchao-w4a8` have 4-bit weights in groups of 32 and 8-bit activations, a scale for every token, both from the
extremes (torchao's activations with a zero point, because it has no others).
`ours-w4a8-lsq` learns its scales, in groups of 64; `ours-kmeans4-row` learns a codebook of 16 entries for every row of
every weight. `ours-w8a8` has 8 bits and a scale for every row and token, fake-quantized; `-int8` and `-fp8` multiply
their codes in the forward pass, and `ours-w8a8g8-...` in all three products, with gradients rounded at random. Each arm
is a process of its own; its first loss is compared with that of the references. `tokens_per_s` is the median of three
windows of four steps.
`quantize_share` is what our kernels take of the time that a step keeps the GPU busy. Memory is what tensors took at
most; of CUDA graphs what was reserved, since their tensors are not counted.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import qat
from benchmarks.kmeans_1b import LARGE, TINY, now, peak_gib
from benchmarks.record import commit, device, record
from lightning_modules.causal_lm import parameter_groups
from lightning_modules.compilation import CompiledBlocks
from lightning_modules.loss import LOSSES, HeadLoss, head_loss
from qat.atomic import replaced_file
from qat.kernels.ops import reference_kernels
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer

REFERENCE = "bf16"
TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
RANDOM8 = partial(TOKEN8, rounding="stochastic", scale_dtype="float32")
INT8 = {"weight": partial(MinMaxQuantizer, bits=8, granularity="per_channel"), "input": TOKEN8}
FP8 = {
    "weight": partial(MinMaxQuantizer, format="fp8_e4m3", granularity="per_channel", scale_dtype="float32"),
    "input": partial(MinMaxQuantizer, format="fp8_e4m3", granularity="per_token", scale_dtype="float32"),
}
ALL = ("forward", "dgrad", "wgrad")
SCHEMES = {
    "ours-w4a8": qat.Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_group_32"), input=TOKEN8),
    "ours-w4a8-lsq": qat.Scheme(weight=partial(LSQQuantizer, bits=4, granularity="per_group_64"), input=TOKEN8),
    "ours-kmeans4-row": qat.Scheme(weight=partial(KMeansQuantizer, bits=4)),
    "ours-w8a8": qat.Scheme(**INT8),
    "ours-w8a8-int8": qat.Scheme(**INT8, compute="int8"),
    "ours-w8a8-fp8": qat.Scheme(**FP8, compute="fp8"),
    "ours-w8a8g8-int8": qat.Scheme(**INT8, grad=RANDOM8, compute="int8", products=ALL),
    "ours-w8a8g8-fp8": qat.Scheme(**FP8, grad=partial(RANDOM8, format="fp8_e5m2"), compute="fp8", products=ALL),
}
ARMS = (REFERENCE, *SCHEMES, "torchao-w4a8")
EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "vocab_size": 128256}
EIGHT |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
_WARM_UP = 4
_WINDOW = 4
_KERNELS = ("_fake_quantize", "_row_codes", "_gradient_", "_transposed_codes")


class Shape(NamedTuple):
    """A model and how it is trained.

    frugal: with 8-bit optimizer state and checkpointed blocks.
    arms: which take part, by how blocks run.
    """

    sizes: dict[str, Any]
    arms: dict[str, tuple[str, ...]]
    batch: tuple[int, int] = (4, 2048)
    frugal: bool = False


class Case(NamedTuple):
    """One arm: how its blocks run, and the model."""

    arm: str
    backend: str
    shape: str


Measured = dict[str, float]
OURS = (REFERENCE, "ours-w4a8", "ours-w4a8-lsq", "ours-kmeans4-row")
FAKE = (*OURS, "torchao-w4a8")
PRODUCTS = ("ours-w8a8", "ours-w8a8-int8", "ours-w8a8-fp8", "ours-w8a8g8-int8", "ours-w8a8g8-fp8")
RECORDED = (REFERENCE, "ours-w8a8g8-fp8")
W4A8_ALONE = (REFERENCE, "ours-w4a8")
ALONE = {"eager": W4A8_ALONE, "inductor": W4A8_ALONE}
SHAPES = {
    "1b": Shape(LARGE, {"eager": FAKE, "inductor": FAKE + PRODUCTS, "graphs": (*OURS, "ours-w8a8g8-fp8")}),
    "8b4": Shape(EIGHT, {"inductor": (REFERENCE, "ours-w8a8-fp8", "ours-w8a8g8-fp8"), "graphs": RECORDED}),
    "8b": Shape(EIGHT | {"num_hidden_layers": 32}, ALONE, frugal=True),
    "8b-1": Shape(EIGHT | {"num_hidden_layers": 32}, ALONE, (1, 2048), frugal=True),
}
TOYS = {
    "toy": Shape(TINY, {"eager": FAKE + PRODUCTS, "aot_eager": FAKE + PRODUCTS}, (2, 64)),
    "toy-frugal": Shape(TINY, {"eager": W4A8_ALONE, "aot_eager": W4A8_ALONE}, (2, 64), frugal=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="toy size, on any machine")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of an arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these of the shape's")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b"], help="models to train")
    parser.add_argument("--loss", choices=LOSSES, default="auto", help="module.loss of all arms")
    parser.add_argument("--work", type=Path, default=Path("outputs/train_step"), help="where figures are kept")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("This needs a CUDA GPU; --tiny runs the same code on a small model anywhere.")
    shapes = list(TOYS) if options.tiny else options.shapes
    kinds = [(shape, backend) for shape in shapes for backend in (TOYS | SHAPES)[shape].arms]
    cases = [Case(arm, backend, shape) for shape, backend in kinds for arm in arms_of(shape, backend, options.arms)]
    command = f"python -m benchmarks.train_step --shapes {' '.join(shapes)} --steps {options.steps}"
    command += f" --loss {options.loss}" + (f" --arms {' '.join(options.arms)}" if options.arms else "")
    found: dict[Case, Measured] = {}
    for case, figures in measured(cases, options.work, options.steps, options.loss):
        found[case] = figures
        print(row_of(case, found), flush=True)
        if not options.tiny:
            record("train_step", command, [row_of(case, found) for case in found], ("torchao", "triton"))


def arms_of(shape: str, backend: str, only: Sequence[str] | None) -> list[str]:
    """Those of a kind, or of them `only` some and what they are compared with."""
    return [arm for arm in (TOYS | SHAPES)[shape].arms[backend] if only is None or arm in (REFERENCE, *only)]


def row_of(case: Case, found: dict[Case, Measured]) -> dict[str, Any]:
    """What was measured, relative to bf16."""
    own, reference = found[case], found[case._replace(arm=REFERENCE)]
    how = {"compiled": case.backend != "eager", "graphs": case.backend == "graphs"}
    ratios = {
        "speed_ratio": own["tokens_per_s"] / reference["tokens_per_s"],
        "memory_ratio": own["peak_gib"] / reference["peak_gib"],
    }
    return {"arm": case.arm, "model": case.shape} | how | {"reference": REFERENCE} | own | ratios


def measured(cases: Sequence[Case], work: Path, steps: int, kind: str) -> Iterator[tuple[Case, Measured]]:
    """Every case in a process of its own, so that peak memory is its own; what `work` has of this commit stays.

    A kind of blocks is measured on one kind of GPU only: what another left in `work` is not compared with.
    """
    gpu = device().replace(" ", "-")
    paths = {case: work / f"{'-'.join(case)}-{steps}-{kind}-{commit()}-{gpu}.json" for case in cases}
    missing = [case for case in cases if not paths[case].is_file()]
    processes = dict(zip(missing, fresh_processes(len(missing)), strict=True))
    for case, path in paths.items():
        if case in processes:
            with processes[case] as process, replaced_file(path) as temporary:
                temporary.write_text(json.dumps(process.submit(measure, *case, steps, kind).result()))
        yield case, json.loads(path.read_text())


def fresh_processes(count: int) -> list[ProcessPoolExecutor]:
    """Processes that have imported this module: all of them at once, and before anything is timed."""
    processes = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(count)]
    wait([process.submit(int) for process in processes])
    return processes


def measure(arm: str, backend: str, shape: str, steps: int, kind: str = "auto") -> Measured:
    """Tokens a second and peak memory."""
    tiny, how = shape in TOYS, (TOYS | SHAPES)[shape]
    place = torch.device("cpu" if tiny else "cuda")
    torch.manual_seed(0)
    config = LlamaConfig(**({"tie_word_embeddings": True} | how.sizes), max_position_embeddings=2048)
    with place:
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    quantize(model, arm)
    ids = torch.randint(config.vocab_size, how.batch, device=place)
    loss_of = partial(loss, model, head_loss(model, kind), ids)
    with torch.no_grad():
        own = float(loss_of())
        if arm in SCHEMES:
            with reference_kernels():
                expected = float(loss_of())
            if abs(own - expected) > 1e-3 * expected:
                raise SystemExit(f"{arm}: the loss is {own}, that of the references {expected}.")
    if how.frugal:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if backend != "eager":
        compile_blocks(model, "inductor" if backend == "graphs" else backend, backend == "graphs")
    optimizer = optimizer_of(model, how.frugal)

    def step() -> None:
        if backend == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()

    start = now(place)
    step()
    first = now(place) - start
    for _ in range(_WARM_UP - 1):
        step()
    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(_window(step, place) for _ in range(max(1, steps // _WINDOW)))
    peak = torch.cuda.max_memory_reserved() / 2**30 if backend == "graphs" else peak_gib(place)
    found = {"tokens_per_s": ids.numel() / seconds, "peak_gib": peak, "first_step_s": first}
    return found | ({} if tiny else {"quantize_share": quantize_share(step)})


def _window(step: Callable[[], None], place: torch.device) -> float:
    """Seconds a step, where the host waits for the device after the last only, as a run that reads its loss late."""
    start = now(place)
    for _ in range(_WINDOW):
        step()
    return (now(place) - start) / _WINDOW


def loss(model: nn.Module, head: HeadLoss | None, ids: Tensor) -> Tensor:
    """Of the next tokens; by `head` without the logits of all of them."""
    batch = {"input_ids": ids, "labels": ids}
    found: Tensor = model(**batch, use_cache=False).loss if head is None else head(batch)
    return found


def optimizer_of(model: nn.Module, frugal: bool) -> torch.optim.Optimizer:
    """AdamW; frugal: as `optimizer=adamw8bit` builds it."""
    if not frugal:
        return torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    from lightning_modules.optimizers import AdamW8bit

    return AdamW8bit(parameter_groups(model), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)


def quantize_share(step: Callable[[], None]) -> float:
    """Of the time that a step keeps the GPU busy: what our kernels take."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in recorded.key_averages()}
    return sum(time for name, time in times.items() if name.startswith(_KERNELS)) / sum(times.values())


def compile_blocks(model: LlamaForCausalLM, backend: str, cuda_graphs: bool) -> None:
    """As `module.compile` and `module.cuda_graphs` do it; layers that are not ours are compiled by torch's defaults."""
    if any(
        isinstance(module, nn.Linear) and type(module).__module__.startswith("torchao") for module in model.modules()
    ):
        for block in model.model.layers:
            block.compile(backend=backend)
    else:
        CompiledBlocks(model, backend, cuda_graphs)


def quantize(model: nn.Module, arm: str) -> None:
    """Prepare `model` for `arm`: every linear layer but the head."""
    if arm in SCHEMES:
        qat.prepare(model, SCHEMES[arm])
    elif arm != REFERENCE:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
        quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")


if __name__ == "__main__":
    main()
