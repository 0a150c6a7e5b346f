"""Says that packed layers are computed without the kernels of this folder, once for each reason."""

import logging
from functools import cache

import torch
from torch import Tensor

from qat.kernels import dispatch

_LOGGER = logging.getLogger(__name__)


def say_once(x: Tensor, format: str, granularity: str) -> None:
    """Warn why no kernel multiplies `x` by a packed weight; a compiler, which cannot trace a warning, hears none."""
    if not torch.compiler.is_compiling() and not dispatch.only_references():
        _warn(reason(x, format, granularity))


def reason(x: Tensor, format: str, granularity: str) -> str:
    """What stands against the kernels, and what would mend it."""
    if not x.is_cuda:
        return (
            f"Packed layers are multiplied by PyTorch on the device '{x.device.type}': kernels for stored codes need a "
            "CUDA GPU."
        )
    if not dispatch.runs_triton(x):
        return "Packed layers are dequantized for every product, because Triton is not installed: pip install triton."
    if not dispatch.has_hopper_kernels(x):
        return (
            "Packed layers are dequantized for every product on this GPU: kernels for stored codes are for compute "
            "capability 9.0, such as an H100 or H200."
        )
    if x.dtype not in (torch.bfloat16, torch.float16):
        return (
            f"Packed layers are dequantized for every product in {str(x.dtype).removeprefix('torch.')}: cast the model "
            "to bfloat16 or float16, which kernels for stored codes multiply."
        )
    return (
        f"Packed layers of {format} {granularity} are dequantized for every product: no kernel multiplies their codes. "
        "Integers of 2, 3, 4 or 8 bits and codebooks of up to 16 entries have one, with groups of 32, 64 or 128."
    )


@cache
def _warn(reason: str) -> None:
    _LOGGER.warning(reason)
