"""What the operators of a training step were for, from the events that torch.profiler recorded."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FAKE_QUANTIZATION = "fake quantization"
MATRIX_PRODUCTS = "matrix products"
ATTENTION = "attention"
ELEMENTWISE = "norms, activations, elementwise"
FUSED = "fused by the compiler"
LOSS = "loss"
OPTIMIZER = "optimizer"
IDLE = "data and idle"
CATEGORIES = (FAKE_QUANTIZATION, MATRIX_PRODUCTS, ATTENTION, ELEMENTWISE, FUSED, LOSS, OPTIMIZER, IDLE)

# Whatever happens inside these is for them.
_WHOLE = (
    (re.compile(r"^qat::"), FAKE_QUANTIZATION),
    (re.compile(r"scaled_dot_product|flash_attn|efficient_attention|flex_attention", re.IGNORECASE), ATTENTION),
    (re.compile(r"^enumerate\(DataLoader\)"), IDLE),
    (re.compile(r"^bitsandbytes::optimizer|^aten::_fused_adam"), OPTIMIZER),
)
# Of these, what is nothing of its own inside them.
_REST = (
    (
        re.compile(r"^aten::(mm|addmm|bmm|baddbmm|_?grouped_mm|_scaled_mm|_int_mm|matmul|linear|einsum|convolution)\b"),
        MATRIX_PRODUCTS,
    ),
    (re.compile(r"FakeQuantiz|StraightThrough|QuantizeGrad|LowBitLinear"), FAKE_QUANTIZATION),
    (re.compile(r"cross_?entropy|log_softmax|nll_loss|LogSoftmax|NllLoss|logsumexp", re.IGNORECASE), LOSS),
    (re.compile(r"^## Call CompiledFxGraph"), FUSED),
)
# What a kernel is for by its own name, where what surrounds it does not say: nothing else is left of the operators in a
# CUDA graph. Kernels that inductor fuses are called after the operators in them, products too, so they come first.
_KERNELS = (
    (re.compile(r"^triton_(?!tem_)\w*?fused"), FUSED),
    (re.compile(r"^_(fake_quantize|row_codes|gradient_(extremes|scales|codes)|transposed_codes)"), FAKE_QUANTIZATION),
    (re.compile(r"^_(loss(es)?_and_gradient|times)\b"), LOSS),
    (re.compile(r"flash|fmha|attention|attn", re.IGNORECASE), ATTENTION),
    (re.compile(r"^triton_tem_|gemm|gemv|cutlass|xmma|nvjet|cublas", re.IGNORECASE), MATRIX_PRODUCTS),
)
_BACKWARD_NODE = "autograd::engine::evaluate_function"
_USER_SCOPE = 7  # torch's RecordScope


@dataclass
class Spent:
    """Time on the device in microseconds, and the number of operators, on a GPU of kernels, that took it."""

    microseconds: float = 0.0
    calls: int = 0


def attribute(events: Iterable[Any], on_gpu: bool) -> dict[str, Spent]:
    """How much of its time each category took.

    An operator is what its own name says, or else what surrounds it is for; scopes named like a category count as such.
    In the backward pass, what says nothing itself belongs to what the operator of the forward pass was for. A kernel on
    a GPU is what the operator that launched it is, or by its own name more: one launch of a CUDA graph is many kernels.

    Args:
        events: `torch.profiler.profile.events()`.
        on_gpu: count the time of kernels, not that of the CPU.

    Returns:
        An entry for each category, FUSED only where there is any; of the idle time only what loading data took.
    """
    spent = {category: Spent() for category in CATEGORIES}
    forward: dict[int, str] = {}
    category_of: dict[int, tuple[str, bool]] = {}
    own = [event for event in events if event.device_type.name == "CPU" and event.name != "[memory]"]
    for event in sorted(own, key=lambda event: (event.time_range.start, -event.time_range.end)):
        parent = category_of.get(id(event.cpu_parent), (ELEMENTWISE, False))
        category, whole = _category(event, parent, forward)
        category_of[id(event)] = category, whole
        if not _is_backward(event) and event.sequence_nr >= 0:
            forward[event.sequence_nr] = category
        if event.scope == _USER_SCOPE:
            continue
        own_time = (
            [(kernel.name, kernel.duration) for kernel in event.kernels]
            if on_gpu
            else [("", event.self_cpu_time_total)]
        )
        for name, took in own_time:
            if took > 0:
                purpose = category if whole else _of_kernel(name) or category
                spent[purpose].microseconds += took
                spent[purpose].calls += 1
    return {category: own for category, own in spent.items() if category != FUSED or own.calls}


def _of_kernel(name: str) -> str | None:
    return next((category for pattern, category in _KERNELS if pattern.search(name)), None)


def _category(event: Any, parent: tuple[str, bool], forward: dict[int, str]) -> tuple[str, bool]:
    """What `event` is for, and whether everything inside it is."""
    category, whole = parent
    if whole:
        return parent
    if event.name in CATEGORIES:
        return event.name, event.name != LOSS  # the head multiplies in there
    for pattern, named in _WHOLE:
        if pattern.search(event.name):
            return named, True
    for pattern, named in _REST:
        if pattern.search(event.name):
            return named, False
    if event.name.startswith(_BACKWARD_NODE):
        return forward.get(event.sequence_nr, category), False
    return category, False


def _is_backward(event: Any) -> bool:
    return event.scope == 1 or event.name.startswith(_BACKWARD_NODE)


def peak_allocated(kineto_events: Iterable[Any]) -> int:
    """Bytes that were allocated at most beyond what was allocated when recording began."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto_events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
