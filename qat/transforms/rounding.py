"""Rounding that is learned: what takes the place of a weight's quantizer meanwhile."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat.kernels import ops
from qat.kernels.linear import fake_quantized_linear
from qat.nn import QuantLinear
from qat.numerics.gaps import clipped, gaps
from qat.numerics.qtensor import QParams
from qat.numerics.ste import round_to_storage, smallest_scale
from qat.quantizers import Quantizer


class LearnedRounding(nn.Module):
    """The grid of a layer's weight quantizer, with a weight and scales that steps of gradient signs move.

    A weight moves in units of the gap between the two grid values around it, a scale in powers of two. So one length
    of step serves every layer, every group and every grid.

    Attributes:
        weight: `[out, in]`, the moved one, in float32: steps are too small for bfloat16.
        log_scale: log2 of how much larger scales became, shaped like them; None where they stay: where they are
            quantized themselves, or where each has a codebook of its own, which was fitted with it.
    """

    log_scale: nn.Parameter | None

    @torch.no_grad()
    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        weight, quantizer = layer.weight.detach(), quantizer_of(layer)
        self._quantizer = (quantizer,)  # a submodule would belong to the model
        self._start = quantizer.ready_qparams(quantizer.masked(weight))
        scale, params, granularity = self._start.scale, self._start.for_view(), quantizer.granularity
        gap = gaps(granularity.view(weight), params, quantizer.format)
        self._gap = granularity.unview(gap, weight.shape)
        self.weight = nn.Parameter(weight.to(torch.float32, copy=True))
        own_codebook = params.codebook is not None and len(params.codebook) == len(params.scale)
        moves = isinstance(scale, Tensor) and not own_codebook
        self.log_scale = nn.Parameter(torch.zeros(quantizer.param_shape, device=weight.device)) if moves else None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As the quantizer's, of the weight held here instead of the one that is given."""
        q, qparams = self._quantizer[0], self._qparams()
        view = clipped(q.granularity.view(self.weight), qparams.for_view(), q.format)
        weight = q.granularity.unview(view, self.weight.shape)
        return fake_quantized_linear(x, weight, bias, qparams, q.format, q.granularity, mask=q.mask)

    @torch.no_grad()
    def step_(self, gradients: Mapping[Tensor, Tensor], length: float, scale_length: float) -> None:
        """Move weights by `length` gaps and scales by `scale_length` octaves, each against the sign of its gradient."""
        self.weight.addcmul_(gradients[self.weight].sign_(), self._gap, value=-length)
        if self.log_scale is not None:
            self.log_scale.sub_(gradients[self.log_scale].sign_(), alpha=scale_length)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Give the quantizer the scales, and `weight` the values on their grid."""
        quantizer = self._quantizer[0]
        if self.log_scale is not None:
            quantizer.adopt(self._qparams().for_view())
        weight.copy_(on_grid(quantizer, self.weight))

    def _qparams(self) -> QParams:
        scale = self._start.scale
        if self.log_scale is None or not isinstance(scale, Tensor):
            return self._start
        dtype = self._quantizer[0].scale_dtype
        moved = (scale * torch.exp2(self.log_scale)).clamp(min=smallest_scale(dtype))
        return self._start._replace(scale=round_to_storage(moved, dtype))


def quantizer_of(layer: QuantLinear) -> Quantizer:
    """Of the weight of a layer whose weight is quantized."""
    assert isinstance(layer.weight_quantizer, Quantizer)
    return layer.weight_quantizer


@torch.no_grad()
def on_grid(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """`weight` rounded to the nearest values of the grid of `quantizer`."""
    weight = quantizer.masked(weight.detach())
    grid = quantizer.ready_qparams(weight), quantizer.format, quantizer.granularity
    return ops.fake_quantize(weight, *grid)


@contextmanager
def learned_rounding(layers: Iterable[QuantLinear]) -> Iterator[list[LearnedRounding]]:
    """Put one in the place of the weight quantizer of each of `layers` for a while; then what was learned stays."""
    pairs = [(layer, LearnedRounding(layer)) for layer in layers]
    quantizers = [quantizer_of(layer) for layer, _ in pairs]
    try:
        for layer, rounding in pairs:
            layer.weight_quantizer = rounding  # type: ignore[assignment]
        yield [rounding for _, rounding in pairs]
    finally:
        for (layer, _), quantizer in zip(pairs, quantizers, strict=True):
            layer.weight_quantizer = quantizer
    for layer, rounding in pairs:
        rounding.settle(layer.weight)
