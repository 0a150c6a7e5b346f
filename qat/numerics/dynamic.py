"""Rules by which scale and zero point follow from the tensor alone, by name.

An artifact keeps the name of the rule for an activation, so that loading it needs no Quantizer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qat.errors import InputError, nearest
from qat.numerics.formats import FloatFormat, Format
from qat.numerics.granularity import Granularity, refuse_padding
from qat.numerics.qtensor import ViewParams
from qat.numerics.ste import round_up_to_storage, smallest_scale


@torch.no_grad()
def absmax_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Symmetric scale of each group: scale = max|x| / highest grid value, rounded up to `scale_dtype`.

    Symmetric min-max quantization as in LLM-QAT (arXiv 2305.17888); with a codebook format, block-wise absmax as in
    QLoRA (arXiv 2305.14314).
    """
    return ViewParams(_covering_scale(_absmax(view), format.range()[1], scale_dtype))


@torch.no_grad()
def minmax_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Asymmetric scale and integer zero point of each group; zero itself stays on the grid.

    scale = (largest - smallest) / (high - low); zero_point = round(low - smallest / scale), which moves one end of the
    data beyond the grid, by half a step at most: no further from it than values between two steps are. A scale that
    covered both ends would be coarser by half with 2 bits, by 7 % with 4.
    """
    low, high = format.range()
    smallest, largest = _extremes(view)
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scale = round_up_to_storage(divided(largest - smallest, high - low), scale_dtype)
    return ViewParams(scale, (low - smallest / scale).round().clamp_(low, high))


@torch.no_grad()
def microscaling_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Power-of-two scale of each block: log2(scale) = floor(log2(max|x|)) - exponent of the largest grid value.

    OCP Microscaling Formats (MX) 1.0, section 6.3; Microscaling Data Formats for Deep Learning (arXiv 2310.10537).
    The largest values of a block may saturate: that is the price of a scale without mantissa.
    """
    if not isinstance(format, FloatFormat):
        raise InputError(f"Microscaling scales small floats, not {format.name}: set format to fp4_e2m1 or fp8_e4m3.")
    exponent = (_absmax(view).contiguous().view(torch.int32) >> 23) - 127 - format.largest_exponent
    return ViewParams(torch.exp2(exponent.clamp_(-126, 127).to(torch.float32)))


@torch.no_grad()
def absmean_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Scale of each group: scale = mean|x|.

    Ternary as BitNet b1.58 (arXiv 2402.17764); binary as XNOR-Net (arXiv 1603.05279), where it is the least-squares
    optimum.
    """
    return ViewParams(_to_storage(_mean(view.abs()), scale_dtype))


@torch.no_grad()
def twn_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Scale of each group: scale = mean of the |x| above 0.7 mean|x|.

    Ternary Weight Networks (arXiv 1605.04711). Codes are then the nearest ones, a threshold of scale / 2 instead of
    0.7 mean|x|, which for the same scale is never worse in squared error.
    """
    magnitude = view.abs().to(torch.float32)
    above = magnitude > 0.7 * _mean(magnitude)
    return ViewParams(_to_storage((magnitude * above).sum(1, True) / above.sum(1, True).clamp(min=1), scale_dtype))


Rule = Callable[[Tensor, Format, torch.dtype], ViewParams]
DYNAMIC_RULES: dict[str, Rule] = {
    "absmax": absmax_params,
    "minmax": minmax_params,
    "microscaling": microscaling_params,
    "absmean": absmean_params,
    "twn": twn_params,
}
RULES_OF_MEANS = ("absmean", "twn")


def check_rule(rule: str, granularity: Granularity, shape: Sequence[int]) -> None:
    """Refuse a rule that is none, or that takes means of a tensor of `shape` which `granularity` pads with zeros.

    Raises:
        InputError: if so.
    """
    if rule not in DYNAMIC_RULES:
        raise InputError(f"There is no rule '{rule}' for dynamic qparams.{nearest(rule, DYNAMIC_RULES)}")
    if rule in RULES_OF_MEANS:
        refuse_padding(granularity, shape)


def _extremes(view: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest element of each group in float32 `[groups, 1]`; zeros where groups are empty."""
    if view.numel() == 0:
        return (torch.zeros(len(view), 1, device=view.device),) * 2
    return view.amin(1, keepdim=True).to(torch.float32), view.amax(1, keepdim=True).to(torch.float32)


def _absmax(view: Tensor) -> Tensor:
    smallest, largest = _extremes(view)
    return torch.maximum(largest, -smallest)


def _covering_scale(extreme: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """The least scale that `dtype` stores by which `extreme` is at most `steps`, also when float32 divides.

    There extreme / (extreme / steps) may be a little more than `steps`, and so lie beyond the grid, where stochastic
    rounding is biased.
    """
    scale = divided(extreme, steps)
    scale = torch.where(extreme / scale > steps, scale * (1 + torch.finfo(torch.float32).eps), scale)
    return round_up_to_storage(scale, dtype)


def divided(value: Tensor, divisor: float) -> Tensor:
    """Rounded to nearest everywhere: by a number, GPUs multiply by its reciprocal, and would find another scale."""
    return value / torch.full_like(value, divisor)


def _mean(view: Tensor) -> Tensor:
    """Mean of each group in float32; 0 where groups are empty."""
    return view.sum(1, keepdim=True, dtype=torch.float32) / max(1, view.shape[1])


def _to_storage(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale that `dtype` stores, positive and finite, in float32."""
    return scale.clamp(smallest_scale(dtype), torch.finfo(dtype).max).to(dtype).to(torch.float32)
