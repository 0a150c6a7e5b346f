"""Quantization as functions of tensors: the definition that every kernel and every export is tested against."""

import torch
from torch import Tensor

from qat.errors import InputError, nearest
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, QuantizedTensor, ViewParams, codes_shape, scale_down, unscale
from qat.numerics.ste import round_up_to_storage, straight_through


def fake_quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> Tensor:
    """Quantize and dequantize `x` in one differentiable expression.

    v = clip(x / scale + zero_point); v_hat = decode(encode(v)), straight through; x_hat = (v_hat - zero_point) * scale.

    Autograd derives from it the clipped straight-through gradient of x, the LSQ gradient of a learned scale
    (arXiv 1902.08153), the LSQ+ gradient of a zero point (arXiv 2004.09576), and for every codebook entry the sum of
    its members' gradients. This is the definition; `qat.kernels` computes the same in fewer passes.

    Args:
        x: any shape and floating dtype.

    Returns:
        x_hat, shaped and typed like `x`.
    """
    params = qparams.for_view()
    v = format.clip(scale_down(granularity.view(x), params))
    with torch.no_grad():
        codes = format.encode(v, params.codebook)
    v_hat = straight_through(v, format.decode(codes, params.codebook))
    return granularity.unview(unscale(v_hat, params), x.shape).to(x.dtype)


@torch.no_grad()
def quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> QuantizedTensor:
    """Turn `x` into codes under given qparams."""
    params = qparams.for_view()
    codes = format.encode(scale_down(granularity.view(x), params), params.codebook)
    codes = granularity.of_codes(format.block).unview(codes, codes_shape(x.shape, format))
    return QuantizedTensor(codes, qparams, format, granularity, x.dtype)


@torch.no_grad()
def absmax_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Symmetric scale of each group: scale = max|x| / highest grid value, rounded up to `scale_dtype`.

    Symmetric min-max quantization as in LLM-QAT (arXiv 2305.17888); with a codebook format, block-wise absmax as in
    QLoRA (arXiv 2305.14314).
    """
    smallest, largest = _extremes(view)
    absmax = torch.maximum(largest, -smallest)
    return ViewParams(round_up_to_storage(absmax / format.range()[1], scale_dtype))


@torch.no_grad()
def minmax_params(view: Tensor, format: Format, scale_dtype: torch.dtype) -> ViewParams:
    """Asymmetric scale and integer zero point of each group; zero itself stays on the grid."""
    low, high = format.range()
    smallest, largest = _extremes(view)
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    scale = round_up_to_storage((largest - smallest) / (high - low), scale_dtype)
    return ViewParams(scale, (low - smallest / scale).round().clamp_(low, high))


def _extremes(view: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest element of each group in float32 `[groups, 1]`; zeros where groups are empty."""
    if view.numel() == 0:
        return (torch.zeros(len(view), 1, device=view.device),) * 2
    return view.amin(1, keepdim=True).to(torch.float32), view.amax(1, keepdim=True).to(torch.float32)


DYNAMIC_RULES = {"absmax": absmax_params, "minmax": minmax_params}


def dynamic_qparams(
    x: Tensor, rule: str, format: Format, granularity: Granularity, scale_dtype: torch.dtype
) -> QParams:
    """Compute qparams from `x` itself by a named rule: `absmax` (symmetric) or `minmax` (asymmetric)."""
    if rule not in DYNAMIC_RULES:
        raise InputError(f"There is no rule '{rule}' for dynamic qparams.{nearest(rule, DYNAMIC_RULES)}")
    found = DYNAMIC_RULES[rule](granularity.view(x.detach()), format, scale_dtype)
    shape = granularity.param_shape(x.shape)
    zero_point = None if found.zero_point is None else found.zero_point.reshape(shape)
    return QParams(found.scale.reshape(shape), zero_point)
