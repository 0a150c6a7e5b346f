"""Learned step sizes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.numerics.dynamic import minmax_params
from qat.numerics.formats import Format, IntFormat, LevelFormat
from qat.numerics.granularity import Granularity, refuse_padding
from qat.numerics.qtensor import QParams, ViewParams
from qat.numerics.search import least_squares_scale
from qat.numerics.ste import exp2_to_storage, straight_through
from qat.quantizers.base import Quantizer
from qat.quantizers.log_scale import log_scale_of
from qat.quantizers.observers import Observer, SampleObserver

_GRIDS = ("integers", "stretched", "ternary")


class LSQQuantizer(Quantizer):
    """A uniform grid with a learned scale (LSQ, arXiv 1902.08153), and a learned zero point (LSQ+, arXiv 2004.09576).

    The gradient of the scale is LSQ's, including its factor 1 / sqrt(elements * highest code), where the elements are
    those of the weight, or the features of the activation, that share the scale. The parameter is
    log2(scale), as in TQT (arXiv 1903.08066): the scale stays positive, and one learning rate means the same relative
    change for every layer. The zero point is rounded to an integer, straight through, so that zero stays on the grid.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 2 to 8; 1 to 8 when stretched; 2 when ternary.
        symmetric: learn only the scale.
        grid: `integers`, two's complement; `stretched`, 2^bits levels around zero, none of them zero, which serve one
            and two bits better (ParetoQ, arXiv 2502.02631); `ternary`, three levels.
    """

    zero_point: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 4,
        granularity: str | Granularity = "per_channel",
        symmetric: bool = True,
        grid: str = "integers",
        scale_dtype: str = "bfloat16",
    ) -> None:
        super().__init__(shape, _grid(grid, bits, symmetric), granularity, scale_dtype)
        if grid == "stretched":  # padding would have an error there, because zero is no level
            refuse_padding(self.granularity, self.shape)
        self.initialized = False
        self.log_scale = nn.Parameter(torch.zeros(self.param_shape))
        self.zero_point = None if symmetric else nn.Parameter(torch.zeros(self.param_shape))

    def qparams(self, x: Tensor) -> QParams:
        # Features of an activation count, its tokens do not: a batch in parts has the gradient of the whole.
        elements = max(1.0, math.prod(self.shape) / math.prod(self.param_shape))
        factor = 1 / math.sqrt(elements * max(1.0, self.format.range()[1]))
        scale = exp2_to_storage(self.log_scale, self.scale_dtype, factor)
        if self.zero_point is None:
            return QParams(scale)
        zero_point = straight_through(self.zero_point * factor, self.zero_point.detach())
        bounded = zero_point.clamp(*self.format.range())
        return QParams(scale, straight_through(bounded, bounded.detach().round()))

    def rescale_(self, ratio: float) -> None:
        self.log_scale.add_(math.log2(ratio))
        if self.zero_point is not None:
            self.zero_point.div_(ratio)

    def make_observer(self) -> Observer:
        return SampleObserver()

    def initialize_from(self, view: Tensor) -> None:
        self._fit(view, None)

    def initialize_weighted(self, view: Tensor, importance: Tensor) -> None:
        self._fit(view, importance)

    def _fit(self, view: Tensor, importance: Tensor | None) -> None:
        """Start at the scale of least squared error, found by shrinking the min-max range."""
        low, high = self.format.range()
        if self.zero_point is None:
            start = ViewParams(view.abs().amax(1, keepdim=True).to(torch.float32) / max(-low, high))
        else:
            start = minmax_params(view, self.format, self.scale_dtype)
        self.adopt(start._replace(scale=least_squares_scale(view, self.format, start, importance=importance)))

    @torch.no_grad()
    def adopt(self, params: ViewParams) -> bool:
        self.log_scale.copy_(log_scale_of(params.scale, self.scale_dtype).view(self.param_shape))
        if self.zero_point is not None and params.zero_point is not None:
            self.zero_point.copy_(params.zero_point.view(self.param_shape))
        return True


def _grid(grid: str, bits: int, symmetric: bool) -> Format:
    if grid not in _GRIDS:
        raise InputError(f"There is no grid '{grid}'.{nearest(grid, _GRIDS)}")
    if grid == "integers":
        return IntFormat(bits, signed=symmetric)
    if not symmetric:
        raise InputError(f"The grid '{grid}' is symmetric around zero: set symmetric=true, or grid=integers.")
    if grid == "ternary" and bits != 2:
        raise InputError(f"The grid 'ternary' is stored in 2 bits, not {bits}: set bits=2, or grid=stretched.")
    if bits not in range(1, 9):
        raise InputError(f"The grid 'stretched' has 1 to 8 bits, not {bits}.")
    return LevelFormat(3 if grid == "ternary" else 2**bits)
