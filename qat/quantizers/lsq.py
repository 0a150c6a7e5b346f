"""Learned step sizes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qat.numerics.formats import IntFormat
from qat.numerics.functional import minmax_params
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, ViewParams, scale_down, unscale
from qat.numerics.ste import round_to_storage, straight_through
from qat.quantizers.base import Quantizer
from qat.quantizers.log_scale import from_log_scale, log_scale_of
from qat.quantizers.observers import Observer, SampleObserver

# Shrink factors tried for the first scale, from "no clipping" down.
_SEARCH = torch.linspace(1.0, 0.4, 25)


class LSQQuantizer(Quantizer):
    """Integers with a learned scale (LSQ, arXiv 1902.08153); asymmetric, with a learned zero point (LSQ+, 2004.09576).

    The gradient of the scale is LSQ's, including its factor 1 / sqrt(elements * highest code). The parameter is
    log2(scale), as in TQT (arXiv 1903.08066): the scale stays positive, and one learning rate means the same relative
    change for every layer. The zero point is rounded to an integer, straight through, so that zero stays on the grid.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 2 to 8.
        symmetric: learn only the scale.
    """

    zero_point: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 4,
        granularity: str | Granularity = "per_channel",
        symmetric: bool = True,
        scale_dtype: str = "bfloat16",
    ) -> None:
        super().__init__(shape, IntFormat(bits, signed=symmetric), granularity, scale_dtype)
        self.initialized = False
        self.log_scale = nn.Parameter(torch.zeros(self.param_shape))
        self.zero_point = None if symmetric else nn.Parameter(torch.zeros(self.param_shape))

    def qparams(self, x: Tensor) -> QParams:
        groups = math.prod(self.param_shape)
        factor = 1 / math.sqrt(x.numel() / groups * max(1.0, self.format.range()[1]))
        scale = round_to_storage(from_log_scale(_scale_gradient(self.log_scale, factor)), self.scale_dtype)
        if self.zero_point is None:
            return QParams(scale)
        bounded = _scale_gradient(self.zero_point, factor).clamp(*self.format.range())
        return QParams(scale, straight_through(bounded, bounded.detach().round()))

    def make_observer(self) -> Observer:
        return SampleObserver()

    def initialize_from(self, view: Tensor) -> None:
        """Start at the scale of least squared error, found by shrinking the min-max range."""
        view = view.to(torch.float32)
        low, high = self.format.range()
        if self.zero_point is None:
            start = ViewParams(view.abs().amax(1, keepdim=True) / max(-low, high))
        else:
            start = minmax_params(view, self.format, self.scale_dtype)
            assert start.zero_point is not None
            self.zero_point.data.copy_(start.zero_point.view(self.param_shape))
        best = start.scale
        least = torch.full_like(best, math.inf)
        for shrink in _SEARCH:
            candidate = start._replace(scale=(start.scale * shrink).clamp(min=torch.finfo(torch.float32).tiny))
            v_hat = scale_down(view, candidate).round_().clamp_(low, high)
            error = (unscale(v_hat, candidate) - view).square_().sum(1, keepdim=True)
            best = torch.where(error < least, candidate.scale, best)
            least = torch.minimum(error, least)
        self.log_scale.data.copy_(log_scale_of(best, self.scale_dtype).view(self.param_shape))


def _scale_gradient(parameter: Tensor, factor: float) -> Tensor:
    """The parameter itself, with its gradient multiplied by `factor`."""
    return straight_through(parameter * factor, parameter.detach())
