"""The straight-through estimator: the only place where this project replaces a derivative.

Estimating or Propagating Gradients Through Stochastic Neurons (Bengio et al., arXiv 1308.3432).
"""

from typing import Any

import torch
from torch import Tensor


def straight_through(v: Tensor, v_hat: Tensor) -> Tensor:
    """Return `v_hat`, bit for bit; what comes back as its gradient goes to `v` too.

    A `v_hat` that depends on parameters (a codebook) keeps their gradient.
    """
    return _StraightThrough.apply(v, v_hat)


class _StraightThrough(torch.autograd.Function):
    """v_hat + (v - v.detach()), without its two passes over memory."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, v_hat: Tensor) -> Tensor:
        return v_hat.view_as(v_hat)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def round_to_storage(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `value` to what `dtype` can store, straight through, and return it in float32.

    Scales and codebooks pass through here before every use, so that what trains is what ships.
    """
    return straight_through(value, value.detach().to(dtype).to(torch.float32))


def round_up_to_storage(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a positive, detached `value` up to the next number of `dtype`; return float32.

    An absolute maximum divided by a scale rounded up stays inside the grid, so that the largest weight of a group is
    not clipped and keeps its gradient.
    """
    info = torch.finfo(dtype)
    least = smallest_scale(dtype)
    nearest = value.to(dtype)
    above = torch.maximum(value * (1 + info.eps / 2), value + least / 2).to(dtype)
    rounded = torch.where(nearest.to(torch.float32) < value, above, nearest)
    return rounded.clamp(min=least, max=info.max).to(torch.float32)


def smallest_scale(dtype: torch.dtype) -> float:
    """The least scale that is stored: the smallest normal number, of float16 the smallest of all.

    Weights need scales below float16's normal numbers (6e-5); those below bfloat16's (1e-38) belong to groups of zeros.
    """
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny
