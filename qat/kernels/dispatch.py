"""What decides where an operator runs, and how operators are declared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

_HAS_TRITON = find_spec("triton") is not None
_references_only = False


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Compute with the PyTorch references, also where there are faster kernels: to test, to measure, to bisect."""
    global _references_only
    before, _references_only = _references_only, True
    try:
        yield
    finally:
        _references_only = before


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's kernels compute on `x`."""
    return x.is_cuda and _HAS_TRITON and not _references_only


def has_hopper_kernels(x: Tensor) -> bool:
    """Whether kernels in PTX compute on `x`: they were written for, and proven on, compute capability 9.0."""
    return runs_triton(x) and torch.version.hip is None and _capability(x.device) == (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def only_references() -> bool:
    """Whether `reference_kernels` is on."""
    return _references_only


def operator(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag
) -> Callable[..., Any]:
    """Declare one operator, `qat::name(arguments) -> results`, and return how to call it.

    `torch.library.custom_op` would declare it in one call, but costs 0.1 ms a call on a CPU, 800 times in a step.
    Torch's dispatcher too takes longer than a small kernel on a GPU: where it has nothing to do, it is passed by.
    """
    name, _, signature = schema.partition("(")
    torch.library.define(f"qat::{name}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    torch.library.impl(f"qat::{name}", "default")(_without_gradients(reference))
    torch.library.register_fake(f"qat::{name}", fake)
    overload: torch._ops.OpOverload = getattr(torch.ops.qat, name).default

    @wraps(reference)
    def call(x: Tensor, *arguments: Any) -> Any:
        return overload(x, *arguments) if _is_watched(x) else reference(x, *arguments)

    return call


def _without_gradients(reference: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(reference)
    def compute(*arguments: Any) -> Any:
        # Mostly they are off already, and turning them off takes as long as half a launch.
        if not torch.is_grad_enabled():
            return reference(*arguments)
        with torch.no_grad():
            return reference(*arguments)

    return compute


def _is_watched(x: Tensor) -> bool:
    """Whether autograd, a compiler, a mode, a profiler or a kind of tensors wants to see operators on `x`."""
    return (
        torch.compiler.is_compiling()
        or not x.is_cuda
        or torch.is_grad_enabled()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
    )
