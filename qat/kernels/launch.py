"""Launching Triton kernels at a fraction of Triton's own cost.

A training step launches hundreds of small kernels, and Triton takes long to find out, from every argument anew, which
compiled form of a kernel a call wants. Here that is looked up by what the form depends on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Kernel, device, constants and kinds of arguments to what Triton compiled for them.
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
    key = (kernel, device.index, num_warps, *constants.values(), *map(_kind, arguments))
    compiled = _compiled.get(key)
    if compiled is not None:
        return compiled[(programs, 1, 1)](*arguments, *constants.values())
    compiled = kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled
    return None


def _kind(argument: Any) -> Any:
    """What Triton specializes a kernel for: types, alignment to 16 bytes, divisibility by 16, and the number one."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument)
