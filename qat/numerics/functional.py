"""Quantization as functions of tensors: the definition that every kernel and every export is tested against."""

import torch
from torch import Tensor

from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, QuantizedTensor, codes_shape, scale_down, unscale
from qat.numerics.ste import straight_through


def fake_quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> Tensor:
    """Quantize and dequantize `x` in one differentiable expression.

    v = clip(x / scale + zero_point); v_hat = decode(encode(v)), straight through; x_hat = (v_hat - zero_point) * scale.

    Autograd derives from it the clipped straight-through gradient of x, the LSQ gradient of a learned scale
    (arXiv 1902.08153), the LSQ+ gradient of a zero point (arXiv 2004.09576), and for every codebook entry the sum of
    its members' gradients. This is the definition; `qat.kernels` computes the same in fewer passes.

    No code stands for NaN, but x_hat is NaN where x is, so that a run that diverges does not look healthy. There x is
    outside of every grid that clips, and a member of no codebook entry; a scale's gradient is NaN.

    Args:
        x: any shape and floating dtype.

    Returns:
        x_hat, shaped and typed like `x`.
    """
    params = qparams.for_view()
    v = format.clip(scale_down(granularity.view(x), params))
    with torch.no_grad():
        codes = format.encode(v, params.codebook)
    v_hat = torch.where(v.isnan(), v.detach(), format.decode(codes, params.codebook))
    v_hat = straight_through(v, v_hat)
    return granularity.unview(unscale(v_hat, params), x.shape).to(x.dtype)


@torch.no_grad()
def quantize(x: Tensor, qparams: QParams, format: Format, granularity: Granularity) -> QuantizedTensor:
    """Turn `x` into codes under given qparams."""
    params = qparams.for_view()
    codes = format.encode(scale_down(granularity.view(x), params), params.codebook)
    codes = granularity.of_codes(format.block).unview(codes, codes_shape(x.shape, format))
    return QuantizedTensor(codes, qparams, format, granularity, x.dtype)
