"""The head and its loss, forward and backward, by every way that `module.loss` offers: milliseconds and peak memory.

    python -m benchmarks.loss                        on a GPU, all arms in turn, and results/loss.json
    python -m benchmarks.loss --teacher              the same of distillation, and results/distill_loss.json
    python -m benchmarks.loss --shapes tiny          a few seconds on a CPU; writes nothing

liger and cce take part where they are installed and there is a GPU (`pip install 'lightning-qat[liger,cce]'`). `plain`
is what transformers does: a linear layer, logits in float32, cross entropy. Before any timing each arm's loss and
gradients are compared with those of `plain` in float32. Peak memory is what an arm adds to its inputs, gradients
included; on a CPU it is not measured.

With `--teacher` the loss is half that and half KL(teacher || student), of a teacher with a head of the same size, as
`method=distill` computes it: `chunked` by the kernel, `references` without; `plain` by whole logits in float32.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import record
from lightning_modules.distillation.chunked import at_heads
from lightning_modules.distillation.divergences import divergence_of
from lightning_modules.distillation.lazy_logits import Linear, chunk_for
from lightning_modules.distillation.logits import LogitLoss
from lightning_modules.head import Shape
from lightning_modules.loss import cce, chunked, liger
from qat.kernels.ops import reference_kernels


class Sizes(NamedTuple):
    """Of the head and of what it is given."""

    tokens: int
    hidden: int
    vocabulary: int


SHAPES = {"tiny": Sizes(96, 32, 512), "smollm2": Sizes(8192, 576, 49152), "1b": Sizes(8192, 2048, 128256)}
Arm = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2", "1b"])
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each arm, taking turns")
    parser.add_argument("--teacher", action="store_true", help="distillation from one")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = taught if options.teacher else arms
    rows = [row for name in options.shapes for row in compare(name, SHAPES[name], options.rounds, device, made)]
    for row in rows:
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB {row['memory_ratio']:.2f}"
        print(f"{row['model']:8} {row['arm']:8} {row['ms']:9.2f} ms {row['speed_ratio']:.2f}  {memory}")
    if device == "cuda" and options.shapes == ["smollm2", "1b"]:
        command = f"python -m benchmarks.loss --rounds {options.rounds}"
        if options.teacher:
            record("distill_loss", f"{command} --teacher", rows, ("triton",))
        else:
            record("loss", command, rows, ("liger-kernel", "cut-cross-entropy"))


def arms(sizes: Sizes, device: str) -> dict[str, Arm]:
    """Every way to the mean loss of `(x, weight, targets)` that can run here."""
    ways: dict[str, Any] = {"chunked": partial(chunked, sizes.hidden)}
    if device == "cuda":
        installed = {"liger": (liger, "liger_kernel"), "cce": (cce, "cut_cross_entropy")}
        ways |= {name: way for name, (way, package) in installed.items() if importlib.util.find_spec(package)}
    fused = {name: partial(_mean, way) for name, way in ways.items()}
    return {"plain": plain, **fused}


def taught(sizes: Sizes, device: str) -> dict[str, Arm]:
    """The ways to distil."""
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = partial(torch.randn, generator=generator, device=device)
    x_teacher = draw(sizes.tokens, sizes.hidden).to(dtype)
    w_teacher = (draw(sizes.vocabulary, sizes.hidden) / sizes.hidden**0.5).to(dtype)
    loss, chunk = LogitLoss(divergence_of("forward_kl"), weight=0.5), chunk_for(sizes.hidden, sizes.vocabulary)

    def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        teacher = Linear(x_teacher[: len(x)].to(x.dtype), w_teacher.to(x.dtype), None)
        return at_heads(Linear(x, weight, None), teacher, targets, chunk, loss)[0] / len(targets)

    def references(*of: Tensor) -> Tensor:
        with reference_kernels():
            return chunked(*of)

    def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        z = F.linear(x, weight).float()
        log_p = F.linear(x_teacher[: len(x)].to(x.dtype), w_teacher.to(x.dtype)).float().log_softmax(-1)
        divergence = F.kl_div(z.log_softmax(-1), log_p, reduction="batchmean", log_target=True)
        return 0.5 * F.cross_entropy(z, targets) + 0.5 * divergence

    return {"plain": whole, "chunked": chunked, "references": references}


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def _mean(way: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    total: Tensor = way(x, weight, None, targets, Shape())
    return total / len(targets)


def compare(
    name: str, sizes: Sizes, rounds: int, device: str, made: Callable[[Sizes, str], dict[str, Arm]] = arms
) -> list[dict[str, Any]]:
    """One row for each arm; ratios are medians over the rounds, to `plain` of the same round."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = partial(torch.randn, generator=generator, device=device)
    x = draw(sizes.tokens, sizes.hidden).to(dtype).requires_grad_()
    weight = (draw(sizes.vocabulary, sizes.hidden) / sizes.hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator, device=device)
    ways = made(sizes, device)
    errors = {arm: _check(arm, way, ways["plain"], x, weight, targets) for arm, way in ways.items()}
    found: dict[str, list[tuple[float, int]]] = {arm: [] for arm in ways}
    for arm in track([arm for _ in range(rounds + 2) for arm in ways], description=name):
        found[arm].append(_measure(ways[arm], x, weight, targets))
    rows = []
    for arm, runs in found.items():
        pairs = list(zip(runs, found["plain"], strict=True))[2:]
        peak, plain_peak = (max(run[1] for run in side) for side in zip(*pairs, strict=True))
        rows.append(
            {
                "arm": arm,
                "model": name,
                **sizes._asdict(),
                "dtype": str(dtype).removeprefix("torch."),
                "ms": statistics.median(run[0] for run, _ in pairs),
                "speed_ratio": statistics.median(reference[0] / run[0] for run, reference in pairs),
                "peak_gib": peak / 2**30 if device == "cuda" else None,
                "memory_ratio": peak / plain_peak if device == "cuda" else None,
                "gradient_error": errors[arm],
            }
        )
    return rows


def _step(way: Arm, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    x.grad = weight.grad = None
    loss = way(x, weight, targets)
    loss.backward()
    return loss.detach()


def _measure(way: Arm, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, int]:
    """Milliseconds of a step, and the bytes it took at most beyond its inputs."""
    if x.device.type != "cuda":
        start = time.perf_counter()
        _step(way, x, weight, targets)
        return 1e3 * (time.perf_counter() - start), 0
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    _step(way, x, weight, targets)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated() - before


def _check(arm: str, way: Arm, plain: Arm, x: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Relative error of the gradients against float32, on some of the tokens.

    Raises:
        AssertionError: if it is beyond what 16 bits explain, and what CCE leaves out (softmax below 2^-12).
    """
    some = x.detach()[:1024].requires_grad_()
    exact = [leaf.detach().float().requires_grad_() for leaf in (some, weight)]
    expected = _step(plain, *exact, targets[:1024])
    loss = _step(way, some, weight, targets[:1024])
    errors = [
        float((own.grad.float() - e.grad).norm() / e.grad.norm()) for own, e in zip((some, weight), exact, strict=True)
    ]
    assert abs(float(loss - expected)) < 1e-2 * float(expected), arm
    assert max(errors) < (5e-2 if arm == "cce" else 2e-2), (arm, errors)
    return max(errors)


if __name__ == "__main__":
    main()
