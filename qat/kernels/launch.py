"""Launching Triton kernels at a fraction of Triton's own cost.

A training step launches hundreds of small kernels, and Triton takes long to find out, from every argument anew, which
compiled form of a kernel a call wants. Here that is looked up by what the form depends on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Kernel, programs, device, constants and kinds of arguments to what launches the form that Triton compiled for them.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: Mapping[str, Any], num_warps: int = 4
) -> None:
    """Run `kernel` on the device of its first argument, without contracting products and sums.

    Args:
        kernel: made by `triton.jit`; its compile-time constants come last, in the order of `constants`.
        programs: how many of them.
        arguments: tensors, integers and floats.
        constants: hashable values, by name.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, arguments, constants, num_warps)
    key = (kernel, programs, device.index, num_warps, *constants.values(), *map(_kind, arguments))
    run = _compiled.get(key)
    if run is not None:
        return run(*arguments, *constants.values(), stream=_stream(device))
    compiled = kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled[(programs, 1, 1)]
    return None


def _stream(device: torch.device) -> int | None:
    """The handle of the current stream, which `torch.cuda.current_stream` wraps at some cost; None on a CPU."""
    handle: int | None = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
    return handle


def _kind(argument: Any) -> Any:
    """What Triton specializes a kernel for: types, alignment to 16 bytes, divisibility by 16, and the number one."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument)
