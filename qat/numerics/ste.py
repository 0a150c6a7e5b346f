"""The straight-through estimator: the only place where this project replaces a derivative.

Estimating or Propagating Gradients Through Stochastic Neurons (Bengio et al., arXiv 1308.3432).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    return straight_through(value, _nearest(value.detach(), dtype))


def exp2_to_storage(exponent: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """2^exponent rounded to what `dtype` can store, in float32; straight through, its gradient multiplied by `factor`.

    What `round_to_storage` makes of `torch.exp2`, in fewer and smaller steps: every layer takes them at every step.
    """
    return _Exp2ToStorage.apply(exponent, dtype, factor)


class _Exp2ToStorage(torch.autograd.Function):
    """Its derivative is that of factor * 2^exponent."""

    @staticmethod
    def forward(ctx: Any, exponent: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
        exact = torch.exp2(exponent)
        ctx.save_for_backward(exact)
        ctx.slope = math.log(2) * factor
        return _nearest(exact, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (exact,) = ctx.saved_tensors
        return grad * exact * ctx.slope, None, None


def round_up_to_storage(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a positive, detached `value` up to the next number of `dtype`; return float32.

    An absolute maximum divided by a scale rounded up stays inside the grid, so that the largest weight of a group is
    not clipped and keeps its gradient.
    """
    info = torch.finfo(dtype)
    least = smallest_scale(dtype)
    nearest = _nearest(value, dtype)
    above = _nearest(torch.maximum(value * (1 + info.eps / 2), value + least / 2), dtype)
    return torch.where(nearest < value, above, nearest).clamp(min=least, max=info.max)


def _nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of `dtype` nearest to each `value`, ties to even, in float32."""
    if torch.compiler.is_dynamo_compiling() and value.dtype == torch.float32 and dtype in _DROPPED:
        return _nearest_by_bits(value, dtype)
    return value.to(dtype).to(torch.float32)


# Bits that the mantissa of a float32 has more.
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}


def _nearest_by_bits(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As `_nearest`, without a pair of conversions: some versions of inductor drop that, and so the rounding."""
    dropped, bits, magnitude = _DROPPED[dtype], value.view(torch.int32), value.abs()
    half_up = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    rounded = ((half_up >> dropped) << dropped).view(torch.float32)
    if dtype == torch.float16:
        # Below its normal numbers it is spaced as float32 is from one half on.
        rounded = torch.where(magnitude < 2**-14, torch.copysign((magnitude + 0.5) - 0.5, value), rounded)
        rounded = torch.where(magnitude >= 65520, torch.copysign(torch.full_like(value, math.inf), value), rounded)
    return torch.where(value.isnan(), value, rounded)


def smallest_scale(dtype: torch.dtype) -> float:
    """The least scale that is stored: the smallest normal number, of float16 the smallest of all.

    Weights need scales below float16's normal numbers (6e-5); those below bfloat16's (1e-38) belong to groups of zeros.
    """
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny
