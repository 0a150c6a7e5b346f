"""Memory for tensors that live for one matrix product."""

import threading

import torch
from torch import Tensor

_buffers = threading.local()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that the next call may overwrite.

    On a CPU each thread reuses one buffer, the size of its largest request: fresh memory costs a page fault every
    4 KiB, more than the values written there. GPUs have an allocator that reuses memory by itself.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    size = shape.numel() * dtype.itemsize
    buffer = getattr(_buffers, "bytes", None)
    if buffer is None or buffer.numel() < size:
        buffer = _buffers.bytes = torch.empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(shape)
