"""Whether losses and gradients are still numbers, found out without a GPU being waited for."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qat.errors import InputError


class _Seen(NamedTuple):
    finite: Tensor
    copied: torch.cuda.Event | None
    explain: Callable[[], str]


class FiniteWatch:
    """Stops a training at a value that is no number: at once on a CPU, on a GPU when the next value comes.

    Asking a GPU for a value waits until it has done all its work, and then it waits in turn for the next operator. The
    answer for an earlier value is there already. `look` asks for the last one, before anything is kept of a run.

    Args:
        late: whether values are looked at when the next one comes; those of a GPU should be.
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self._seen: _Seen | None = None

    def see(self, value: Tensor, explain: Callable[[], str]) -> None:
        """Take note of `value`; `explain` words the message if it is not finite.

        Raises:
            InputError: if it, or the value before, is not finite.
        """
        self.look()
        self._seen = _copied(torch.isfinite(value.detach()), explain)
        if not self.late:
            self.look()

    def look(self) -> None:
        """Make sure of the last value.

        Raises:
            InputError: if it is not finite.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return
        if seen.copied is not None:
            seen.copied.synchronize()
        if not seen.finite:
            raise InputError(seen.explain())


def _copied(finite: Tensor, explain: Callable[[], str]) -> _Seen:
    """`finite` on its way into memory that can be read without a word to the GPU, once the event has come."""
    if not finite.is_cuda:
        return _Seen(finite, None, explain)
    host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Seen(host, event, explain)


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let a fused optimizer of torch leave the weights alone, on the device, if the norm of the gradients is no number.

    It is how a scaler of float16 gradients tells it. Others take the step.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~torch.isfinite(norm)).to(torch.float32)  # type: ignore[attr-defined]
