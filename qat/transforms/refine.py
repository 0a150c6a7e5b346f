"""Refine matrices that lie on their grids: least squares on scales and codebooks, then coordinate descent on codes."""

from dataclasses import replace

import torch
from torch import Tensor

from qat.numerics.descent import descend, refit
from qat.numerics.qtensor import QuantizedTensor, ViewParams
from qat.quantizers import Quantizer
from qat.transforms.stack import Stack


def refined(stack: Stack, w_hat: Tensor, hessian: Tensor) -> Tensor:
    """`w_hat` with a smaller tr((W - W_hat) H (W - W_hat)^T), row by row, or the same; the quantizers get their grids.

    Args:
        stack: W, `[out, in]`, and what quantizes it.
        w_hat: `[out, in]` in float32, on the grids of `stack`.
        hessian: `[in, in]`, up to a factor.
    """
    parts = zip(stack.quantizers, stack.split(stack.weight), stack.split(w_hat), strict=True)
    found = torch.cat([_refitted(quantizer, weight, own, hessian) for quantizer, weight, own in parts])
    return descend(stack.weight, found, hessian, stack.columns())


def _refitted(quantizer: Quantizer, weight: Tensor, w_hat: Tensor, hessian: Tensor) -> Tensor:
    """The codes of `w_hat` under the scales and the codebook that fit them best, if `quantizer` can hold these."""
    if quantizer.mask is not None:  # another grid need not have the zero that pruned weights decode to
        return w_hat
    q = replace(quantizer.quantize(w_hat), dtype=torch.float32)
    params = refit(weight, q, hessian)
    return w_hat if params is None or not quantizer.adopt(params) else _with(q, params).dequantize()


def _with(q: QuantizedTensor, params: ViewParams) -> QuantizedTensor:
    """The codes of `q` under other scales and another codebook."""
    scale, codebook = q.qparams.scale, q.qparams.codebook
    assert isinstance(scale, Tensor)
    if codebook is not None and params.codebook is not None:
        codebook = params.codebook.view_as(codebook)
    return replace(q, qparams=q.qparams._replace(scale=params.scale.view_as(scale), codebook=codebook))
