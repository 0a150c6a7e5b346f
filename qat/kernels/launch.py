"""Launching Triton kernels at a fraction of Triton's own cost.

A training step launches hundreds of small kernels, and Triton takes long to find out, from every argument anew, which
compiled form of a kernel a call wants. Here everything but the tensors is settled once, and the form is looked up by
what it still depends on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# How many launches a module keeps of each of its kernels: as many as a model has sizes, and its batches lengths.
KEPT = 4096


class Launch:
    """A launch of a kernel that waits for its tensors; products and sums are not contracted.

    Args:
        kernel: made by `triton.jit`; it takes tensors, then numbers that change from call to call, if any, then others,
            then compile-time constants.
        programs: how many of them.
        numbers: integers and floats.
        constants: by name, in the order of the kernel.
        options: of Triton's compiler, such as `maxnreg`.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int | float, ...],
        constants: Mapping[str, Any],
        num_warps: int = 4,
        **options: int,
    ) -> None:
        self._kernel, self._programs, self._numbers = kernel, programs, numbers
        self._options = dict(constants) | {"num_warps": num_warps, "enable_fp_fusion": False} | options
        self._rest = (*numbers, *constants.values())
        # Device and kinds of tensors to what launches the form that Triton compiled for them.
        self._forms: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor, changing: tuple[int | float, ...] = ()) -> None:
        """Run on the device of the first of `tensors`, in its current stream.

        Args:
            changing: numbers for which the kernel must not be specialized (`do_not_specialize`), below 2^31.
        """
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors, changing=changing)
        # Triton specializes a kernel for the alignment of tensors to 16 bytes.
        key = device.index, *[(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
        run = self._forms.get(key)
        if run is not None:
            return run(*tensors, *changing, *self._rest, stream=_stream(device))
        compiled = self._kernel[(self._programs,)](*tensors, *changing, *self._numbers, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._forms[key] = compiled[(self._programs, 1, 1)]
        return None


def _stream(device: torch.device) -> int | None:
    """The handle of the current stream, which `torch.cuda.current_stream` wraps at some cost; None on a CPU."""
    handle: int | None = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
    return handle
