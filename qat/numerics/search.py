"""The scale of least squared error, by search."""

import math

import torch
from torch import Tensor

from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams, scale_down, unscale

# Shrink factors to try, from "no clipping" down: for weights, for grids of few levels, and for activations, whose
# outliers may be a hundred times the rest.
_NARROW = torch.linspace(1.0, 0.4, 25)
_FEW = torch.linspace(1.0, 0.15, 35)
_WIDE = torch.logspace(0, -2, 60)
_FEW_LEVELS = 4


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
