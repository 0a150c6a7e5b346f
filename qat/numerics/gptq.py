"""GPTQ: round the columns of a matrix one after the other, each taking up the errors of those before it.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323. Functions of
tensors only; `qat.transforms.gptq` finds the Hessians and applies the result to a model, `qat.numerics.sparsity` prunes
by the same loop.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams, ViewParams, scale_down, unscale

# How much more damping each time that a Hessian is not positive definite, and when to give up.
_MORE, _MOST = 10.0, 1.0

# What takes the place of a column: of all columns as they are by then, `[in, out]`, and the position of the one.
Choice = Callable[[Tensor, int], Tensor]


class ColumnGrid(Protocol):
    """What rounds the columns of a matrix one by one."""

    def round(self, values: Tensor, column: int) -> Tensor:
        """The nearest grid values of `values` `[rows]`, which stand in `column`."""


class Columns:
    """The grid of every column of a matrix `[rows, columns]`, whatever shares a scale in it."""

    def __init__(self, qparams: QParams, format: Format, granularity: Granularity, shape: torch.Size) -> None:
        if format.block > 1:
            raise InputError(
                f"GPTQ rounds one column after the other, and one code of {format.name} stands for {format.block} "
                "columns: take a scalar grid, as quantizer@scheme.weight=kmeans."
            )
        self._params, self._format = qparams.for_view(), format
        groups, device = len(self._params.scale), self._params.scale.device
        width = -(-shape.numel() // groups)
        number = torch.arange(groups, dtype=torch.int32, device=device)[:, None].expand(groups, width)
        self._group = granularity.unview(number, shape).t().contiguous()

    def round(self, values: Tensor, column: int) -> Tensor:
        """The nearest grid values of `values` `[rows]`, which stand in `column`."""
        params = self._of(self._group[column])
        v = scale_down(values[:, None], params)
        return unscale(self._format.decode(self._format.encode_(v, params.codebook), params.codebook), params)[:, 0]

    def _of(self, group: Tensor) -> ViewParams:
        """The qparams of elements that belong to `group` `[rows]`."""
        groups = len(self._params.scale)

        def each(field: Tensor | None) -> Tensor | None:
            if field is None or len(field) == 1:
                return field
            return field.index_select(0, group if len(field) == groups else group // (groups // len(field)))

        scale, *others = self._params
        return ViewParams(each(scale), *map(each, others))  # type: ignore[arg-type]


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    columns: ColumnGrid,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
) -> Tensor:
    """Grid values for `weight` that keep its product with the calibration data.

    Minimizes tr((W - W_hat) H (W - W_hat)^T) greedily: the error of column i is spread over the columns after it by
    the Cholesky factor U of H^-1 = U^T U, w_j <- w_j - (w_i - w_hat_i) U_ij / U_ii.

    Args:
        weight: `[out, in]`.
        hessian: X^T X, `[in, in]`, up to a factor.
        columns: the grid. Its scales stay as they are ("static groups"), so any order of columns will do.
        damping: added to the diagonal of the Hessian, as a share of its mean; more where it is singular all the same.
        act_order: take the columns with the largest inputs first.
        block_size: columns whose updates of later ones are done together.

    Returns:
        w_hat, `[out, in]` in float32.

    Raises:
        InputError: if the Hessian holds NaN or infinity, or cannot be inverted.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if act_order else torch.arange(len(diagonal), device=weight.device)
    factor = inverse_factor(hessian[order][:, order], damping)
    names = order.tolist()
    return column_by_column(weight, factor, order, lambda w, i: columns.round(w[i], names[i]), block_size)


def column_by_column(weight: Tensor, factor: Tensor, order: Tensor, choose: Choice, block_size: int) -> Tensor:
    """Replace one column after the other, and let those after it take up the error.

    Args:
        weight: `[out, in]`.
        factor: U of the Hessian in `order`, as `inverse_factor` returns it.
        order: of the columns, `[in]`.
        choose: called for each position; the columns up to the end of its block are up to date by then.
        block_size: columns whose updates of later ones are done together.

    Returns:
        The columns that were chosen, `[out, in]` in float32, in their own order again.
    """
    w = weight.to(torch.float32).t()[order].contiguous()
    w_hat = torch.empty_like(w)
    for start in range(0, len(w), block_size):
        stop = min(start + block_size, len(w))
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            w_hat[i] = choose(w, i)
            torch.div(w[i] - w_hat[i], factor[i, i], out=errors[i - start])
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return torch.empty_like(w).index_copy_(0, order, w_hat).t().contiguous()


@torch.no_grad()
def output_errors(weight: Tensor, w_hat: Tensor, hessian: Tensor) -> Tensor:
    """(w - w_hat) H (w - w_hat)^T of every row, `[out]`: its squared error on the calibration data."""
    difference = weight.to(torch.float32) - w_hat.to(torch.float32)
    return ((difference @ hessian) * difference).sum(1)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, of H^-1 = U^T U, in float32; features that are always zero count as uncorrelated.

    Raises:
        InputError: if the Hessian holds NaN or infinity, or cannot be inverted.
    """
    h = hessian.to(torch.float64)
    if not torch.isfinite(h).all():
        raise InputError("The activations of the calibration data hold NaN or infinity, or their squares overflow.")
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(len(h), device=h.device)
    diagonal[diagonal == 0] = mean
    share = damping
    while share <= _MOST:
        damped = h + torch.diag((share * mean).expand(len(h)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper.to(torch.float32)
        share = max(share, 1e-4) * _MORE
    raise InputError(
        "The Hessian is singular however much it is damped: take more, and more varied, calibration data "
        "(calibration_batches), or a larger damping."
    )
