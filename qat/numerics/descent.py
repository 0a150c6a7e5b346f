"""Coordinate descent on codes, and least squares on scales and codebooks: what is left to gain after GPTQ.

Both lower tr((W - W_hat) H (W - W_hat)^T), the squared error of a layer's output on the calibration data, and never
raise it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qat.numerics.columns import ColumnGrid
from qat.numerics.formats import CodebookFormat
from qat.numerics.gptq import column_by_column
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
    found = w_hat.to(torch.float32)
    gradient = (found - weight.to(torch.float32)) @ hessian
    curvature = hessian.diagonal()
    target = found - gradient / curvature.where(curvature > 0, 1.0)
    return column_by_column(found, target, hessian, lambda t, i: columns.round(t[i], i), block_size)


@torch.no_grad()
def refit(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> ViewParams | None:
    """The scales, or the codebook where each row has its own and one scale, of least error for the codes of `q`.

    With w_hat = theta B for each row, theta solves B H B^T theta = B H w.

    Args:
        weight: `[out, in]`.
        q: what was found for it.
        hessian: `[in, in]`, up to a factor.

    Returns:
        Rounded to storage, and positive where it is a scale; those of `q` for rows that rounding would make worse. None
        where scales are shared by rows, or quantized.
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
    normal = w.new_zeros(len(w), groups, groups)
    for g in range(groups):
        reach = (steps[:, g] @ hessian[g * size : (g + 1) * size, g * size :]).view(len(w), groups - g, size)
        normal[:, g, g:] = (reach * steps[:, g:]).sum(2)
    equations = _Equations(normal + normal.triu(1).mT, ((w @ hessian).view_as(steps) * steps).sum(2))
    scale = params.scale.view(len(w), groups)
    assert isinstance(q.qparams.scale, Tensor)
    found = round_to_storage(equations.solution(scale), q.qparams.scale.dtype)
    found = torch.where(found > 0, found, scale)
    return params._replace(scale=torch.where(equations.is_better(found, scale), found, scale).reshape(-1, 1))


def _with_codebook(w: Tensor, q: QuantizedTensor, params: ViewParams, hessian: Tensor) -> ViewParams:
    table = params.codebook
    assert table is not None
    assert q.qparams.codebook is not None
    codes, entries = q.codes.long(), table.shape[1]
    normal = w.new_empty(len(w), entries, entries)
    for k in range(entries):
        reach = (codes == k).to(torch.float32) @ hessian
        normal[:, k] = torch.zeros_like(table).scatter_add_(1, codes, reach)
    equations = _Equations(normal, torch.zeros_like(table).scatter_add_(1, codes, w @ hessian))
    found = equations.solution(table * params.scale) / params.scale
    found = round_to_storage(found, q.qparams.codebook.dtype).sort(dim=1).values
    is_better = equations.is_better(found * params.scale, table * params.scale)
    return params._replace(codebook=torch.where(is_better, found, table))


class _Equations(NamedTuple):
    """The normal equations N theta = t of each row, whose error is theta^T N theta - 2 t^T theta, but for a constant.

    normal: N, `[rows, n, n]`; target: t, `[rows, n]`.
    """

    normal: Tensor
    target: Tensor

    def solution(self, start: Tensor) -> Tensor:
        """The theta of least error nearest to `start`, `[rows, n]`."""
        normal, target = self
        mean = normal.diagonal(dim1=1, dim2=2).mean(1)[:, None].clamp(min=torch.finfo(torch.float32).tiny)
        ridge = (_RIDGE * mean).to(torch.float64)
        system = normal.to(torch.float64) + torch.diag_embed(ridge.expand_as(start))
        right = target.to(torch.float64) + ridge * start
        solution, failed = torch.linalg.solve_ex(system, right)
        whole = (failed == 0)[:, None] & torch.isfinite(solution)
        return torch.where(whole, solution.to(torch.float32), start)

    def is_better(self, theta: Tensor, start: Tensor) -> Tensor:
        """Whether the error of each row is less at `theta` than at `start`, `[rows, 1]`."""
        moments = torch.einsum("rij,rj->ri", self.normal, theta + start) - 2 * self.target
        return ((theta - start) * moments).sum(1, keepdim=True) < 0


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
