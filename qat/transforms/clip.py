"""Clip the weights of a layer where that makes its outputs better (AWQ, arXiv 2306.00978)."""

import torch
from torch import Tensor

from qat.kernels import ops
from qat.nn import QuantLinear
from qat.numerics.gptq import output_errors
from qat.numerics.granularity import PerChannel, PerGroup
from qat.quantizers import KMeansQuantizer, Quantizer, VectorQuantizer

# How much of its largest weight a group may keep, from all of it down to a half.
_SHRINKS = tuple(1 - step / 20 for step in range(1, 11))


@torch.no_grad()
def clip_(layer: QuantLinear, moment: Tensor) -> None:
    """Clip every group of the weights of `layer` at the share of its extremes that leaves the least output error.

    The error of a group is d M d^T with the group's own d = w - Q(clip(w)) and its block of M, as if other groups had
    none; where groups do not lie in one row, all share the share. Nothing is clipped where that would not lower
    the error of the whole layer. The quantizer is then fitted to the clipped weights.

    Args:
        moment: X^T X of what the layer is given, `[in, in]`, up to a factor.
    """
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    assert isinstance(quantizer, Quantizer)
    if isinstance(quantizer, KMeansQuantizer | VectorQuantizer):
        return
    before = _rounded(quantizer, weight)
    least = _group_errors(quantizer, weight - before, moment)
    best = torch.ones_like(least)
    for shrink in _SHRINKS:
        candidate = _clipped(quantizer, weight, torch.full_like(least, shrink))
        error = _group_errors(quantizer, weight - _rounded(quantizer, candidate), moment)
        best = torch.where(error < least, shrink, best)
        least = torch.minimum(error, least)
    clipped = _clipped(quantizer, weight, best)
    total_before, total = (output_errors(weight, w, moment).sum() for w in (before, _rounded(quantizer, clipped)))
    if total < total_before:
        weight.copy_(clipped)
    quantizer.initialize(weight)


def _rounded(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """`weight` on the grid that is fitted to it."""
    quantizer.initialize(weight)
    grid = quantizer.ready_qparams(weight), quantizer.format, quantizer.granularity
    return ops.fake_quantize(weight, *grid)


def _clipped(quantizer: Quantizer, weight: Tensor, share: Tensor) -> Tensor:
    """`weight` between shares `[groups]` of the extremes of each group; symmetric where the grid is."""
    view = quantizer.granularity.view(weight)
    high, low = view.amax(1, keepdim=True).clamp(min=0), view.amin(1, keepdim=True).clamp(max=0)
    if quantizer.ready_qparams(weight).zero_point is None:
        high = torch.maximum(high, -low)
        low = -high
    share = share[:, None].to(view.dtype)
    return quantizer.granularity.unview(view.clamp(low * share, high * share), weight.shape)


def _group_errors(quantizer: Quantizer, difference: Tensor, moment: Tensor) -> Tensor:
    """The squared output error of every group `[groups]`, in the order of its view."""
    difference, granularity = difference.to(torch.float32), quantizer.granularity
    rows, columns = difference.shape
    if granularity == PerChannel(0):
        return ((difference @ moment) * difference).sum(1)
    if isinstance(granularity, PerGroup):
        size = granularity.group_size
        d = difference.view(rows, -1, size).transpose(0, 1)
        blocks = moment.view(columns // size, size, columns // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return ((d @ blocks) * d).sum(2).t().reshape(-1)
    total = ((difference @ moment) * difference).sum()
    return total.expand(len(granularity.view(difference)))
