"""The cross entropy of logits and its gradient, which is written in their place: a row by one program, read twice."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quantize.tiles import ceil_div, power_of_two
from qat.kernels.launch import KEPT, Launch

_WIDTH, _WARPS = 8192, 16
# Elements that a program of `times` writes.
_COPIED = 2048


@triton.jit
def shaped(z, scale, softcap, CAPPED: tl.constexpr):
    """The logits that z becomes, and their derivative."""
    if CAPPED:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1), which is 1 or -1 where the exponential leaves its range.
        bounded = 1 - 2 / (tl.exp(2 * (scale / softcap) * z) + 1)
        v, slope = softcap * bounded, scale * (1 - bounded * bounded)
    else:
        v, slope = scale * z, scale
    return v, slope


@triton.jit
def logits_of(own, column, columns, scale, softcap, CAPPED: tl.constexpr):
    """Logits of words of a row, -inf where there is none, and their derivatives."""
    z = tl.load(own + column, mask=column < columns, other=0).to(tl.float32)
    v, slope = shaped(z, scale, softcap, CAPPED)
    return tl.where(column < columns, v, float("-inf")), slope


@triton.jit
def logit_of_target(own, target, counts, columns, scale, softcap, CAPPED: tl.constexpr):
    """The logit of the next token; of what is no word NaN, which training does not overlook."""
    is_word = counts & (target >= 0) & (target < columns)
    z = tl.load(own + target, mask=is_word, other=float("nan")).to(tl.float32)
    return shaped(z, scale, softcap, CAPPED)[0]


@triton.jit
def with_logits(most, total, v):
    """The greatest of all logits so far, and the sum of exponentials relative to it, with those of `v`."""
    higher = tl.maximum(most, tl.max(v, axis=0))
    return higher, total * tl.exp(most - higher) + tl.sum(tl.exp(v - higher), axis=0)


@triton.jit
def _loss_and_gradient(
    z,
    targets,
    losses,
    columns,
    ignored,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own, target = z + row * columns, tl.load(targets + row)
    counts = target != ignored
    at_target = logit_of_target(own, target, counts, columns, scale, softcap, CAPPED)
    most, total = -3.4028234663852886e38, 0.0  # finite, so that a tile of -inf makes no NaN
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        most, total = with_logits(most, total, logits_of(own, column, columns, scale, softcap, CAPPED)[0])
    tl.store(losses + row, tl.where(counts, tl.log(total) + most - at_target, 0.0))
    if GRADIENT:
        share = tl.where(counts, 1 / total, 0.0)
        for first in range(0, columns, WIDTH):
            column = first + tl.arange(0, WIDTH)
            v, slope = logits_of(own, column, columns, scale, softcap, CAPPED)
            # Selected, not multiplied: what does not count is 0 whatever its logits are.
            gradient = (tl.exp(v - most) * share - tl.where(column == target, 1.0, 0.0)) * slope
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(own + column, gradient.to(z.dtype.element_ty), mask=column < columns)


@triton.jit
def _times(total, factor, out, count, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(total + at, mask=at < count, other=0) * tl.load(factor)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


def loss_and_gradient(
    z: Tensor, targets: Tensor, scale: float, softcap: float | None, ignored: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """As `reference.loss_and_gradient`; the gradient lies where z did."""
    rows, columns = z.shape
    z, losses = z.contiguous(), torch.zeros(rows, dtype=torch.float32, device=z.device)
    if rows:
        _loss_ready(rows, columns, ignored, scale, softcap, with_gradient)(z, targets.contiguous(), losses)
    return losses, z if with_gradient else None


@lru_cache(KEPT)
def _loss_ready(
    rows: int, columns: int, ignored: int, scale: float, softcap: float | None, with_gradient: bool
) -> Launch:
    constants = {
        "CAPPED": softcap is not None,
        "GRADIENT": with_gradient,
        "WIDTH": min(_WIDTH, power_of_two(columns)),
    }
    numbers = columns, ignored, float(scale), float(softcap or 1.0)
    return Launch(_loss_and_gradient, rows, numbers, constants, _WARPS)


def times(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `reference.times`, in one pass where the dtypes differ too."""
    total = total.contiguous()
    out = total if dtype == total.dtype else torch.empty(total.shape, dtype=dtype, device=total.device)
    if total.numel():
        _times_ready(total.numel())(total, factor.float(), out)
    return out


@lru_cache(KEPT)
def _times_ready(count: int) -> Launch:
    return Launch(_times, ceil_div(count, _COPIED), (count,), {"WIDTH": _COPIED})
