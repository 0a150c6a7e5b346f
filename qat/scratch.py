"""Memory for tensors that live for one step of a computation."""

import threading

import torch
from torch import Tensor

_buffers = threading.local()
# Elements of a block: what fits the cache of every CPU core that takes part; on a GPU, a bound to the temporaries.
_BLOCK_OF_A_CORE, _BLOCK_OF_A_GPU = 2**17, 2**25


def scratch(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that the next call with the same `name` may overwrite.

    On a CPU each thread reuses one buffer a name, the size of its largest request: fresh memory costs a page fault
    every 4 KiB, more than the values written there, and what is freed leaves holes between what is kept. GPUs have an
    allocator that reuses memory by itself.
    """
    # Under a dispatch mode (fake tensors, counters) nothing is kept: what it makes is no plain memory.
    if device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.empty(shape, dtype=dtype, device=device)
    size = shape.numel() * dtype.itemsize
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        setattr(_buffers, name, buffer)
    return buffer[:size].view(dtype).view(shape)


def block_elements(device: torch.device) -> int:
    """How many elements to work on at a time where many small passes in place are to cost about one long one."""
    return _BLOCK_OF_A_CORE * torch.get_num_threads() if device.type == "cpu" else _BLOCK_OF_A_GPU
