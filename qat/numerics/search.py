"""Scales of small error: of the least squares, by search, and of a robust error, by half-quadratic steps."""

import math

import torch
from torch import Tensor

from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams, scale_down, unscale
from qat.numerics.ste import smallest_scale

# Shrink factors to try, from "no clipping" down: for weights, for grids of few levels, and for activations, whose
# outliers may be a hundred times the rest.
_NARROW = torch.linspace(1.0, 0.4, 25)
_FEW = torch.linspace(1.0, 0.15, 35)
_WIDE = torch.logspace(0, -2, 60)
_FEW_LEVELS = 4
# The p of the robust error, the weight beta of its splitting and how that grows: those of HQQ.
_P, _BETA, _GROWTH = 0.7, 10.0, 1.01
_STEPS = 20


@torch.no_grad()
def least_squares_scale(
    view: Tensor, format: Format, start: ViewParams, outliers: bool = False, importance: Tensor | None = None
) -> Tensor:
    """Shrink the scales of `start`, which cover all of `view`, to where sum (x_hat - x)^2 of each group is least.

    Args:
        view: `[groups, elements]`.
        format: the grid.
        start: scale `[groups, 1]`, and a zero point that is kept.
        outliers: search further down, as activations need.
        importance: how much each squared error counts, shaped like `view`; None: all alike.

    Returns:
        Scale `[groups, 1]`.
    """
    view = view.to(torch.float32)
    best = start.scale
    least = torch.full_like(best, math.inf)
    few = format.code_range[1] - format.code_range[0] < _FEW_LEVELS
    for shrink in _WIDE if outliers else _FEW if few else _NARROW:
        candidate = start._replace(scale=(start.scale * shrink).clamp(min=torch.finfo(torch.float32).tiny))
        v_hat = format.decode(format.encode_(scale_down(view, candidate)))
        squares = (unscale(v_hat, candidate) - view).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(1, keepdim=True)
        best = torch.where(error < least, candidate.scale, best)
        least = torch.minimum(error, least)
    return best


@torch.no_grad()
def half_quadratic_scale(view: Tensor, format: Format, start: ViewParams, scale_dtype: torch.dtype) -> Tensor:
    """Lower sum |x_hat - x|^0.7 of each group from `start` on, in small steps: an error in which outliers count little.

    Half-Quadratic Quantization (HQQ, Badri and Shaji 2023, mobiusml.github.io/hqq_blog) splits the error into e, which
    may hold outliers, and a rest that is squared: |e|_p^p + beta / 2 |e - (x - x_hat)|^2. By turns e shrinks,
    |e| <- max(0, |e| - |e|^(p - 1) / beta), and x - e is fitted by least squares for the codes of the moment. The
    source moves a zero point that is a float, and keeps the scale. Here zero points are integers, which such steps
    leave where they are, so the scale moves. The least robust error itself is no aim: a search for it clips so much
    that models get worse.

    Args:
        view: `[groups, elements]`.
        format: of integers or floats.
        start: scale `[groups, 1]`, and a zero point that is kept.
        scale_dtype: what scales are rounded to.

    Returns:
        Scale `[groups, 1]`: for each group the best of all steps, `start` included.
    """
    x, params, beta = view.to(torch.float32), start, _BETA
    best, least = start.scale, torch.full_like(start.scale, math.inf)
    for _ in range(_STEPS + 1):
        v_hat = format.decode(format.encode_(scale_down(x, params)))
        difference = x - unscale(v_hat, params)
        error = difference.abs().pow_(_P).sum(1, keepdim=True)
        best = torch.where(error < least, params.scale, best)
        least = torch.minimum(error, least)
        # In units of the scale, so that the result does not depend on how large x is.
        e = _shrunk(difference / start.scale, beta) * start.scale
        steps = v_hat if params.zero_point is None else v_hat - params.zero_point
        params = params._replace(scale=_fitted(x - e, steps, params.scale, scale_dtype))
        beta *= _GROWTH
    return best


def _shrunk(e: Tensor, beta: float) -> Tensor:
    """The u of least |u|^p + beta / 2 (u - e)^2 for each element, by the generalized soft threshold."""
    magnitude = e.abs()
    least = torch.finfo(e.dtype).tiny
    return e.sign() * (magnitude - magnitude.clamp(min=least).pow(_P - 1) / beta).clamp_(min=0)


def _fitted(x: Tensor, steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The s of least |x - s steps|^2 for each group, as `dtype` stores it; `scale` where that is not positive."""
    found = (x * steps).sum(1, keepdim=True) / steps.square().sum(1, keepdim=True)
    found = torch.where(torch.isfinite(found) & (found > 0), found, scale)
    return found.clamp(min=smallest_scale(dtype)).to(dtype).to(torch.float32)
