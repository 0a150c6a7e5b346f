"""Scales inside Triton kernels: from the extreme of a group to a scale that storage holds.

Each function does what `qat.numerics.dynamic` and `qat.numerics.ste` do, to the bit, and keeps NaN.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from qat.numerics.ste import smallest_scale


@lru_cache
def storage_constants(dtype: torch.dtype) -> dict[str, Any]:
    """What rounding a scale up to `dtype` needs to know."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):  # microscaling rounds by its own rule
        return {"EPS": 0.0, "SMALLEST": 0.0, "LARGEST": 0.0, "STORAGE": "exponent"}
    info = torch.finfo(dtype)
    ends = {"EPS": info.eps, "SMALLEST": smallest_scale(dtype), "LARGEST": info.max}
    return ends | {"STORAGE": str(dtype).removeprefix("torch.")}


@triton.jit
def magnitude_bits(x):
    """|x| by its bits, integers in the order of the numbers that keep NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def at_most(value, bound):
    """The lesser of both, or NaN."""
    return tl.where(value > bound, bound, value)


@triton.jit
def at_least(value, bound):
    """The greater of both, or NaN."""
    return tl.where(value < bound, bound, value)


@triton.jit
def _stored(value, STORAGE: tl.constexpr):
    """`value` >= 0, rounded to nearest in bfloat16, float16 or float32, as float32."""
    if STORAGE == "bfloat16":
        # By its bits, because Triton's interpreter does not round.
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        stored = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    elif STORAGE == "float16":
        stored = value.to(tl.float16).to(tl.float32)
    else:
        stored = value
    return stored


@triton.jit
def rounded_up(value, EPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, STORAGE: tl.constexpr):
    """As `qat.numerics.ste.round_up_to_storage`."""
    nearest = _stored(value, STORAGE)
    above = _stored(at_least(value * (1 + EPS / 2), value + SMALLEST / 2), STORAGE)
    return at_most(at_least(tl.where(nearest < value, above, nearest), SMALLEST), LARGEST)


@triton.jit
def covering_scale(
    extreme, high, EPS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, STORAGE: tl.constexpr
):
    """The scale of `qat.numerics.dynamic.absmax_params` for groups of which `extreme` is max|x|."""
    scale = tl.div_rn(extreme, tl.zeros_like(extreme) + high)
    scale = tl.where(tl.div_rn(extreme, scale) > high, scale * 1.00000011920928955078125, scale)
    return rounded_up(scale, EPS, SMALLEST, LARGEST, STORAGE)
