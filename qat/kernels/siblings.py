"""Queries, keys and values multiply the same hidden states, gate and up do: quantized alike, once is enough.

It saves time and, what counts more, memory: each layer keeps what it multiplies for its backward pass, and so all keep
the same tensor, as they do without quantization.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_latest = threading.local()


def once_for_siblings(x: Tensor, key: Hashable, compute: Callable[[], T]) -> T:
    """`compute()`, or its result for the very same `x`, unchanged since, and `key`, if that was the latest call.

    The result lives as long as x does, or until another tensor comes. A compiler finds equal calls by itself.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return compute()
    # Only what a graph made: leaves may be changed without a word to the version counter, by optimizers, by `x.data`,
    # by NumPy, and inference tensors have none.
    if x.grad_fn is None:
        return compute()
    slot: tuple[Any, ...] | None = getattr(_latest, "slot", None)
    if slot is not None and slot[0]() is x and slot[1:3] == (x._version, key):
        result: T = slot[3]
        return result
    found = compute()
    _latest.slot = (weakref.ref(x, _forget), x._version, key, found)
    return found


def _forget(x: "weakref.ref[Tensor]") -> None:
    slot = getattr(_latest, "slot", None)
    if slot is not None and slot[0] is x:
        _latest.slot = None
