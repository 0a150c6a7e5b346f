"""Scales of small error: of the least squares, by search, and of a robust error, by half-quadratic steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams, scale_down, unscale
from qat.numerics.ste import smallest_scale
from qat.scratch import block_elements, scratch

# Shrink factors to try, from "no clipping" down: for weights, for grids of few levels, and for activations, whose
# outliers may be a hundred times the rest.
_NARROW = torch.linspace(1.0, 0.4, 25)
_FEW = torch.linspace(1.0, 0.15, 35)
_WIDE = torch.logspace(0, -2, 60)
_FEW_LEVELS = 4
# Of how many places one is tried first, and how far from the best of them the others are.
_STRIDE, _FINER = 4, (2, 1)
# The p of the robust error, the weight beta of its splitting and how that grows: those of HQQ.
_P, _BETA, _GROWTH = 0.7, 10.0, 1.01
_STEPS = 20


@torch.no_grad()
def least_squares_scale(
    view: Tensor, format: Format, start: ViewParams, outliers: bool = False, importance: Tensor | None = None
) -> Tensor:
    """Shrink the scales of `start`, which cover all of `view`, to where sum (x_hat - x)^2 of each group is least.

    All factors are tried: the error of a group of few levels has several valleys.

    Args:
        view: `[groups, elements]`.
        format: the grid.
        start: scale `[groups, 1]`, and a zero point that is kept.
        outliers: search further down, as activations need.
        importance: how much each squared error counts, shaped like `view`; None: all alike.

    Returns:
        Scale `[groups, 1]`.
    """
    few = format.code_range[1] - format.code_range[0] < _FEW_LEVELS
    shrinks = (_WIDE if outliers else _FEW if few else _NARROW).to(view.device)
    step = max(1, block_elements(view.device) // max(1, view.shape[1]))
    found = torch.empty_like(start.scale)
    for first in range(0, len(view), step):
        own = slice(first, first + step)
        params = ViewParams(start.scale[own], None if start.zero_point is None else start.zero_point[own])
        weights = None if importance is None else importance[own].to(torch.float32)
        found[own] = _searched(view[own].to(torch.float32), format, params, shrinks, weights)
    return found


def _searched(x: Tensor, format: Format, start: ViewParams, shrinks: Tensor, importance: Tensor | None) -> Tensor:
    """The best of the scales of `start` times `shrinks`, for some of the groups."""
    tiny = torch.finfo(torch.float32).tiny
    best, least = start.scale, torch.full_like(start.scale, math.inf)
    for shrink in shrinks:
        scale = (start.scale * shrink).clamp(min=tiny)
        error = _squared_error(x, format, start._replace(scale=scale), importance)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _squared_error(x: Tensor, format: Format, params: ViewParams, importance: Tensor | None) -> Tensor:
    """Of each group, `[groups, 1]`."""
    v = scale_down(x, params, out=scratch("searched", x.shape, torch.float32, x.device))
    difference = unscale(format.decode(format.encode_(v), out=v), params, out=v).sub_(x)
    squares = difference.square_() if importance is None else difference.square_().mul_(importance)
    return squares.sum(1, keepdim=True)


def least_place(error: Callable[[int], float], count: int) -> int:
    """Which of `count` places has the least error, of those that are tried.

    Every fourth is tried first, then its neighbours around the best of them: where errors fall and rise again, that
    costs less than half of trying all.
    """
    errors = {place: error(place) for place in range(0, count, _STRIDE)}
    for stride in _FINER:
        center = min(errors, key=errors.__getitem__)
        for place in (center - stride, center + stride):
            if 0 <= place < count and place not in errors:
                errors[place] = error(place)
    return min(errors, key=errors.__getitem__)


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
