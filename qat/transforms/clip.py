"""Clip the weights of a layer where that makes its outputs better (AWQ, arXiv 2306.00978)."""

import torch
from torch import Tensor

from qat.kernels import ops
from qat.nn import QuantLinear
from qat.numerics.gptq import output_errors
from qat.numerics.granularity import PerChannel, PerGroup
from qat.quantizers import KMeansQuantizer, Quantizer, VectorQuantizer

# How much of its largest weight a group may keep, from all of it down to a half.
_SHARES = tuple(1 - step / 20 for step in range(11))


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
    low, high = _extremes(quantizer, weight)

    def clipped(share: float | Tensor) -> Tensor:
        view = quantizer.granularity.view(weight)
        return quantizer.granularity.unview(view.clamp(low * share, high * share), weight.shape)

    best, least = torch.ones_like(high), torch.full_like(high, torch.inf, dtype=torch.float32)
    for share in _SHARES:
        error = _group_errors(quantizer, weight - _rounded(quantizer, clipped(share)), moment)[:, None]
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    candidate = clipped(best)
    before, after = (output_errors(weight, _rounded(quantizer, w), moment).sum() for w in (weight, candidate))
    if after < before:
        weight.copy_(candidate)
    quantizer.initialize(weight)


def _rounded(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """`weight` on the grid that is fitted to it."""
    quantizer.initialize(weight)
    grid = quantizer.ready_qparams(weight), quantizer.format, quantizer.granularity
    return ops.fake_quantize(weight, *grid)


def _extremes(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest weight of every group, `[groups, 1]` each; symmetric where the grid is."""
    low, high = torch.aminmax(quantizer.granularity.view(weight), dim=1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if quantizer.ready_qparams(weight).zero_point is None:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


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
