"""Refine a matrix that lies on its grid: least squares on scales and codebook, then coordinate descent on codes."""

from dataclasses import replace

import torch
from torch import Tensor

from qat.numerics.descent import descend, refit
from qat.numerics.gptq import ColumnGrid, Columns, output_errors
from qat.numerics.qtensor import QuantizedTensor, ViewParams
from qat.numerics.sparsity import MaskedColumns
from qat.quantizers import Quantizer


def refined(weight: Tensor, w_hat: Tensor, hessian: Tensor, quantizer: Quantizer) -> Tensor:
    """`w_hat` with a smaller tr((W - W_hat) H (W - W_hat)^T), row by row, or the same; `quantizer` gets its grid.

    Args:
        weight, w_hat: `[out, in]`; w_hat in float32, on the grid of `quantizer`.
        hessian: `[in, in]`, up to a factor.
    """
    q = replace(quantizer.quantize(w_hat), dtype=torch.float32)
    # Another grid need not have the zero that pruned weights decode to.
    params = refit(weight, q, hessian) if quantizer.mask is None else None
    if params is not None:
        candidate = _with(q, params).dequantize()
        better = output_errors(weight, candidate, hessian) < output_errors(weight, w_hat, hessian)
        if quantizer.adopt(_chosen(better, params, q.qparams.for_view())):
            w_hat = torch.where(better[:, None], candidate, w_hat)
    return descend(weight, w_hat, hessian, columns_of(quantizer, weight))


def columns_of(quantizer: Quantizer, weight: Tensor) -> ColumnGrid:
    """The grid of every column of `weight`, where pruned elements are zero."""
    qparams = quantizer.ready_qparams(quantizer.masked(weight))
    columns = Columns(qparams, quantizer.format, quantizer.granularity, weight.shape)
    return columns if quantizer.mask is None else MaskedColumns(columns, quantizer.mask)


def _with(q: QuantizedTensor, params: ViewParams) -> QuantizedTensor:
    """The codes of `q` under other scales and another codebook."""
    scale, codebook = q.qparams.scale, q.qparams.codebook
    assert isinstance(scale, Tensor)
    if codebook is not None and params.codebook is not None:
        codebook = params.codebook.view_as(codebook)
    return replace(q, qparams=q.qparams._replace(scale=params.scale.view_as(scale), codebook=codebook))


def _chosen(better: Tensor, new: ViewParams, old: ViewParams) -> ViewParams:
    """`new` for the rows that are `better` by it; what rows share is the same in both."""
    rows = len(better)

    def each(found: Tensor | None, before: Tensor | None) -> Tensor | None:
        if found is None or before is None or len(found) % rows:
            return before
        return torch.where(better[:, None], found.view(rows, -1), before.view(rows, -1)).view_as(before)

    scale = each(new.scale, old.scale)
    assert scale is not None
    return old._replace(scale=scale, codebook=each(new.codebook, old.codebook))
