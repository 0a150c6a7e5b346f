"""Coordinate descent on codes, and least squares on scales and codebooks: what is left to gain after GPTQ.

Both lower tr((W - W_hat) H (W - W_hat)^T), the squared error of a layer's output on the calibration data, and never
raise it.
"""

import torch
from torch import Tensor

from qat.numerics.formats import CodebookFormat
from qat.numerics.gptq import ColumnGrid
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerToken
from qat.numerics.qtensor import QuantizedTensor, ViewParams
from qat.numerics.ste import round_to_storage

# Added to the diagonal of the normal equations, as a share of its mean: entries and scales that nothing uses stay.
_RIDGE = 1e-6


@torch.no_grad()
def descend(weight: Tensor, w_hat: Tensor, hessian: Tensor, columns: ColumnGrid, block_size: int = 128) -> Tensor:
    """One sweep of coordinate descent: each column in turn goes to its best grid values, the others staying.

    w_hat_i <- round(w_hat_i - ((W_hat - W) H)_i / H_ii), as QuantEase (arXiv 2309.01885).

    Args:
        weight, w_hat: `[out, in]`; w_hat lies on the grid.
        hessian: `[in, in]`, up to a factor.
        columns: the grid.
        block_size: columns whose updates of later ones are done together.

    Returns:
        w_hat, `[out, in]`.
    """
    found = w_hat.to(torch.float32).t().contiguous()
    gradient = hessian @ (found - weight.to(torch.float32).t())
    curvature = hessian.diagonal().tolist()
    for start in range(0, len(found), block_size):
        stop = min(start + block_size, len(found))
        changes = torch.zeros_like(found[start:stop])
        for i in range(start, stop):
            if curvature[i] <= 0:
                continue
            best = columns.round(found[i] - gradient[i] / curvature[i], i)
            torch.sub(best, found[i], out=changes[i - start])
            found[i] = best
            gradient[i + 1 : stop].addr_(hessian[i, i + 1 : stop], changes[i - start])
        gradient[stop:].addmm_(hessian[stop:, start:stop], changes)
    return found.t().contiguous()


@torch.no_grad()
def refit(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> ViewParams | None:
    """The scales, or the codebook where each row has its own and one scale, of least error for the codes of `q`.

    With w_hat = theta B for each row, theta solves B H B^T theta = B H w.

    Args:
        weight: `[out, in]`.
        q: what was found for it.
        hessian: `[in, in]`, up to a factor.

    Returns:
        Rounded to storage, and positive where it is a scale; None where scales are shared by rows, or quantized.
    """
    params = q.qparams.for_view()
    if not isinstance(q.qparams.scale, Tensor) or params.offset is not None or not _within_rows(q.granularity):
        return None
    w = weight.to(torch.float32)
    if _is_row_codebook(q, params, len(w)):
        return _with_codebook(w, q, params, hessian)
    return _with_scales(w, q, params, hessian)


def _with_scales(w: Tensor, q: QuantizedTensor, params: ViewParams, hessian: Tensor) -> ViewParams:
    groups = len(params.scale) // len(w)
    steps = (q.dequantize().to(torch.float32).view(len(params.scale), -1) / params.scale).view(len(w), groups, -1)
    size = steps.shape[2]
    normal = w.new_empty(len(w), groups, groups)
    for g in range(groups):
        reach = (steps[:, g] @ hessian[g * size : (g + 1) * size]).view_as(steps)
        normal[:, g] = (reach * steps).sum(2)
    target = ((w @ hessian).view_as(steps) * steps).sum(2)
    scale = params.scale.view(len(w), groups)
    assert isinstance(q.qparams.scale, Tensor)
    found = round_to_storage(_solve(normal, target, scale), q.qparams.scale.dtype)
    return params._replace(scale=torch.where(found > 0, found, scale).reshape(-1, 1))


def _with_codebook(w: Tensor, q: QuantizedTensor, params: ViewParams, hessian: Tensor) -> ViewParams:
    assert params.codebook is not None
    assert q.qparams.codebook is not None
    codes, entries = q.codes.long(), params.codebook.shape[1]
    normal = w.new_empty(len(w), entries, entries)
    for k in range(entries):
        reach = (codes == k).to(torch.float32) @ hessian
        normal[:, k] = torch.zeros_like(params.codebook).scatter_add_(1, codes, reach)
    target = torch.zeros_like(params.codebook).scatter_add_(1, codes, w @ hessian)
    found = _solve(normal, target, params.codebook * params.scale) / params.scale
    return params._replace(codebook=round_to_storage(found, q.qparams.codebook.dtype).sort(dim=1).values)


def _solve(normal: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """The solution of the normal equations of each row nearest to `start`, `[rows, n]`."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None].clamp(min=torch.finfo(torch.float32).tiny)
    ridge = (_RIDGE * mean).to(torch.float64)
    system = normal.to(torch.float64) + torch.diag_embed(ridge.expand_as(start))
    right = target.to(torch.float64) + ridge * start
    solution, failed = torch.linalg.solve_ex(system, right)
    whole = (failed == 0)[:, None] & torch.isfinite(solution)
    return torch.where(whole, solution.to(torch.float32), start)


def _within_rows(granularity: Granularity) -> bool:
    return granularity == PerChannel(0) or isinstance(granularity, PerGroup | PerToken)


def _is_row_codebook(q: QuantizedTensor, params: ViewParams, rows: int) -> bool:
    table = params.codebook
    return (
        isinstance(q.format, CodebookFormat)
        and table is not None
        and len(table) == rows == len(params.scale)
        and rows > 1
    )
