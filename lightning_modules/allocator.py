"""Memory of a process on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, for the next step, instead of returning it to the system.

    Every training step frees its gradients and activations, and asks for as much again. glibc returns large blocks to
    the system in between; getting them back costs a page fault for each 4 KiB, a fifth of a step of SmolLM2-135M.
    Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
