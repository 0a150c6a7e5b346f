"""Min-max quantization: the scale follows the extremes of the data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat.errors import InputError, nearest
from qat.kernels import ops
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import FloatFormat, Format, IntFormat, LevelFormat, parse_format
from qat.numerics.granularity import Granularity, PerToken
from qat.numerics.qtensor import QParams, ViewParams
from qat.numerics.search import half_quadratic_scale, least_squares_scale
from qat.numerics.ste import round_up_to_storage
from qat.quantizers.base import Quantizer, check_bits
from qat.quantizers.observers import MinMaxObserver, MovingAverageObserver, Observer, SampleObserver
from qat.quantizers.rounding import is_stochastic

# A quantile of one in ten thousand takes many samples.
_OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": lambda: SampleObserver(most=2**20),
    "mse": SampleObserver,
    "hqq": SampleObserver,
}


class MinMaxQuantizer(Quantizer):
    """Integers or small floats scaled to the extremes of each group (LLM-QAT, arXiv 2305.17888).

    symmetric: scale = max|x| / highest grid value. Asymmetric, for integers: scale = (max x - min x) / (2^bits - 1)
    and an integer zero point, whose rounding leaves one extreme up to half a step beyond the grid.
    Gradients pass straight through to x, to that extreme too; the scales are taken as constants. Static scales clip:
    what lies beyond them has no gradient.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 2 to 8 for integers, None is 8; with `format` given None, or the format's own.
        format: fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2, fp4_e2m1, or levels2 ... levels256; None takes integers.
        symmetric: whether zero sits in the middle of the grid.
        dynamic: find the extremes in every x anew; otherwise calibrate once and keep them.
        observer: how a static quantizer condenses the batches it is calibrated on, or fits a weight: `minmax` takes the
            extremes of all, `moving_average` those of each batch in turn (arXiv 1712.05877), `percentile` cuts off the
            tails, `mse` clips where the squared error is least, `hqq` lowers sum |error|^0.7, in which outliers
            count little, by the steps of HQQ.
        percentile: the share of x, in percent, that observer=percentile leaves unclipped.
        rounding: `nearest`, or `stochastic`, whose expectation is x itself: for gradients, and symmetric ones, since
            nothing beyond the grid is its own expectation.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        bits: int | None = None,
        format: str | None = None,
        granularity: str | Granularity = "per_channel",
        symmetric: bool = True,
        dynamic: bool = True,
        observer: str = "minmax",
        percentile: float = 99.9,
        rounding: str = "nearest",
        scale_dtype: str = "bfloat16",
    ) -> None:
        super().__init__(shape, _grid(format, bits, symmetric), granularity, scale_dtype)
        if observer not in _OBSERVERS:
            raise InputError(f"There is no observer '{observer}'.{nearest(observer, _OBSERVERS)}")
        if not 50 < percentile <= 100:
            raise InputError(f"percentile is {percentile}; it lies above 50 and up to 100: set it to 99.9.")
        self.stochastic = is_stochastic(rounding)
        if self.stochastic and not symmetric:
            raise InputError(
                "Stochastic rounding would be biased at the end of the grid that a zero point moves inside the data: "
                "set symmetric=true, or rounding=nearest."
            )
        self.observer_kind, self.percentile = observer, percentile
        self._rule = "absmax" if symmetric else "minmax"
        self.rule = self._rule if dynamic else None
        if dynamic:
            return
        if isinstance(self.granularity, PerToken):
            raise InputError(
                "A static quantizer cannot be per_token: tokens of later batches are not known when calibrating. "
                "Use dynamic=true, or granularity=per_tensor."
            )
        self.initialized = False
        self.register_buffer("scale", torch.ones(self.param_shape))
        if not symmetric:
            self.register_buffer("zero_point", torch.zeros(self.param_shape))

    def qparams(self, x: Tensor) -> QParams:
        if self.rule is None:
            return QParams(self.scale, getattr(self, "zero_point", None))
        return ops.dynamic_qparams(x, self.rule, self.format, self.granularity, self.scale_dtype)

    def rescale_(self, ratio: float) -> None:
        # Up, so that the extremes stay inside.
        self.scale.copy_(round_up_to_storage(self.scale * ratio, self.scale_dtype))
        if self._rule == "minmax":
            self.zero_point.div_(ratio).round_()

    def make_observer(self) -> Observer:
        return _OBSERVERS[self.observer_kind]()

    def initialize_from(self, view: Tensor) -> None:
        if self.rule is not None:
            return
        self.adopt(self._fit(view))

    def adopt(self, params: ViewParams) -> bool:
        if self.rule is not None:
            return False
        self.scale.copy_(params.scale.view(self.param_shape))
        if params.zero_point is not None:
            self.zero_point.copy_(params.zero_point.view(self.param_shape))
        return True

    def _fit(self, view: Tensor) -> ViewParams:
        if self.observer_kind == "percentile":
            view = _without_tails(view, self.percentile, symmetric=self._rule == "absmax")
        rule = DYNAMIC_RULES[self._rule]
        found = rule(view, self.format, self.scale_dtype)
        if self.observer_kind == "hqq":
            return found._replace(scale=half_quadratic_scale(view, self.format, found, self.scale_dtype))
        if self.observer_kind != "mse":
            return found
        shrunk = least_squares_scale(view, self.format, found, outliers=True) / found.scale
        return rule(view * shrunk, self.format, self.scale_dtype)


def _grid(format: str | None, bits: int | None, symmetric: bool) -> Format:
    if format is None:
        return IntFormat(8 if bits is None else bits, signed=symmetric)
    grid = parse_format(format)
    if isinstance(grid, IntFormat) and not grid.signed:
        raise InputError(f"{format} goes with a zero point: set symmetric=false and bits={grid.bits}, without format.")
    if not isinstance(grid, IntFormat | FloatFormat | LevelFormat):
        raise InputError(
            f"Min-max scales come without the codebook of {format}: take KMeansQuantizer or TableQuantizer, or set "
            "format to fp4_e2m1, fp8_e4m3 or levels3."
        )
    if not symmetric:
        raise InputError(f"{format} is symmetric around zero: set symmetric=true, or leave out format for integers.")
    return check_bits(grid, bits)


def _without_tails(view: Tensor, percentile: float, symmetric: bool) -> Tensor:
    """Two values of each group between which `percentile` % of it lie, `[groups, 2]`.

    Symmetric ones, or two quantiles with as much beyond the one as beyond the other.
    """
    view = view.to(torch.float32)
    ordered = (view.abs() if symmetric else view).sort(dim=1).values
    beyond = (1 - percentile / 100) * (view.shape[1] - 1)
    if symmetric:
        bound = ordered[:, -1 - round(beyond)]
        return torch.stack([-bound, bound], dim=1)
    cut = round(beyond / 2)
    return torch.stack([ordered[:, cut], ordered[:, -1 - cut]], dim=1)
