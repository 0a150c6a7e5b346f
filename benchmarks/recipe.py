"""The training that accuracy benchmarks share: the same model, tokens, order and schedule for every arm.

SmolLM2-135M off its grid, Adam, 8 x 512 tokens a step, bf16 autocast, cosine to a tenth; one seed. Perplexity is over
512-token windows. On a GPU a model of this size waits for kernel launches, so that its steps are replays of a CUDA
graph.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.off_grid import rotate_
from lightning_modules.causal_lm import parameter_groups
from lightning_modules.models import load_smollm2

MODEL = "smollm2-rotated"
BATCH, LENGTH = 8, 512
QUANTIZER_LR, WARMUP = 1e-3, 15
# Before a step is captured: kernels compile and the optimizer makes its state.
_EAGER_STEPS = 2


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(weights: dict[str, Tensor] | None = None) -> nn.Module:
    """SmolLM2 off its grid; or with other weights."""
    model = copy.deepcopy(_untrained())
    if weights is not None:
        model.load_state_dict(weights)
    return model.to(device())


@cache
def _untrained() -> nn.Module:
    return rotate_(load_smollm2("~/.cache/lightning-qat").model)


def tokenizer() -> Any:
    """Of the same model."""
    return load_smollm2("~/.cache/lightning-qat").tokenizer


def fit(model: nn.Module, rate: float, train: Tensor, steps: int) -> nn.Module:
    """Train `model` with the peak learning rate `rate`; the windows and their order are the same for every model."""
    losses(model, rate, train, steps)
    return model


def losses(
    model: nn.Module, rate: float, train: Tensor, steps: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As `fit`, and the loss of every step; `seed` gives the windows another order, `dtype` is that of products."""
    torch.manual_seed(seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    batches = train[order[torch.arange(steps * BATCH) % len(order)]].view(steps, BATCH, -1).to(device(), torch.int64)
    training, found = _Training(model, rate, dtype), torch.empty(steps, device=device())
    for index in track(range(steps), description="training"):
        training.step(index, steps, batches[index], found[index])
    training.finish()
    return found.cpu()


class _Training:
    """The optimizer of one model, and on a GPU its stream and its graph."""

    def __init__(self, model: nn.Module, rate: float, dtype: torch.dtype) -> None:
        self._model, self._dtype = model.train(), dtype
        self._optimizer = torch.optim.AdamW(parameter_groups(model, QUANTIZER_LR), rate, (0.9, 0.95), fused=True)
        self._on_gpu = device().type == "cuda"
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            # A tensor, which a graph reads anew in every replay.
            group |= {"lr": torch.tensor(group["lr"], device=device()), "capturable": self._on_gpu}
        self._run: Callable[[Tensor], None] = self._eager
        self._loss = torch.zeros((), device=device())
        self._stream: AbstractContextManager[object] = nullcontext()
        if self._on_gpu:
            torch.cuda.synchronize()
            self._stream = torch.cuda.stream(torch.cuda.Stream())

    def step(self, index: int, steps: int, batch: Tensor, loss: Tensor) -> None:
        """Step `index` of `steps`; writes into `loss`."""
        with self._stream:
            for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
                group["lr"].fill_(peak * _rate(index, steps))
            if self._on_gpu and index == _EAGER_STEPS:
                self._run = _graphed(self._eager, batch)
            self._run(batch)
            loss.copy_(self._loss)

    def finish(self) -> None:
        """Wait for the last step: whoever reads losses or weights does so in another stream."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def _eager(self, batch: Tensor) -> None:
        self._optimizer.zero_grad()
        with torch.autocast(batch.device.type, self._dtype, enabled=self._dtype != torch.float32):
            loss = self._model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        self._loss.copy_(loss.detach())
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()


def _graphed(step: Callable[[Tensor], None], batch: Tensor) -> Callable[[Tensor], None]:
    """`step` as a CUDA graph, for batches shaped like `batch`. Capturing runs nothing."""
    torch.cuda.synchronize()
    static, graph = batch.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step(static)
    return partial(_replay, graph, static)


def _replay(graph: torch.cuda.CUDAGraph, static: Tensor, batch: Tensor) -> None:
    static.copy_(batch)
    graph.replay()


def _rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean next-token loss over all windows, in the precision of training."""
    model.eval()
    losses = []
    for batch in windows.to(device(), torch.int64).split(16):
        with torch.autocast(batch.device.type, torch.bfloat16):
            losses.append(model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch))
    return math.exp(float(torch.stack(losses).sum()) / len(windows))
