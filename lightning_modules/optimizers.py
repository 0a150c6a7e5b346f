"""Optimizers of bitsandbytes with a state of 8 bits, or one that leaves the GPU when memory is short."""

from typing import Any

from bitsandbytes import optim
from torch import Tensor

_LEAST_PAGED = 100_000  # elements, of bitsandbytes


class _State(optim.optimizer.Optimizer2State):
    """What quantizers learn keeps 32 bits; a paged state is paged again once a checkpoint, which holds none, is loaded.

    bitsandbytes keeps tensors below 4096 elements in 32 bits anyway, but scales of groups are more.
    """

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config(gindex, pindex, group)
        return config | {"optim_bits": 32} if group.get("name") == "quantizers" else config

    def prefetch_state(self, p: Tensor) -> None:
        if self.is_paged and p.is_cuda:
            state = self.state[p]
            for name in ("state1", "state2"):
                values = state[name]
                if values.numel() >= _LEAST_PAGED and not getattr(values, "is_paged", False):
                    state[name] = self.get_state_buffer(p, dtype=values.dtype).copy_(values)
        super().prefetch_state(p)


class AdamW8bit(_State, optim.AdamW8bit):
    """AdamW with 8-bit state, in blocks of 256 (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861)."""


class PagedAdamW(_State, optim.PagedAdamW):
    """AdamW whose state, of 32 bits, moves to the CPU where the GPU has no room (QLoRA, arXiv 2305.14314)."""


class PagedAdamW8bit(_State, optim.PagedAdamW8bit):
    """Both."""
