"""GPTQ: round the columns of a matrix one after the other, each taking up the errors of those before it.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv 2210.17323. Functions of
tensors only; `qat.transforms.gptq` finds the Hessians and applies the result to a model, `qat.numerics.sparsity` prunes
by the same loop.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.columns import ColumnGrid
from qat.numerics.finite import all_finite

# How much more damping each time that a Hessian is not positive definite, and when to give up.
_MORE, _MOST = 10.0, 1.0

# Columns that are brought up to date one by one, before those of their block are together.
CHUNK = 16

# The grid of all columns, one group fitted anew: to `[out, in]` with that group as it is by then, and its number.
GroupFit = Callable[[Tensor, int], ColumnGrid]

# What takes the place of a column: of all columns as they are by then, `[in, out]`, and the position of the one.
Choice = Callable[[Tensor, int], Tensor]


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

    Minimizes tr((W - W_hat) H (W - W_hat)^T) greedily: with H = R R^T and R upper triangular, in the order of the
    columns, it is the sum over j of |sum_{i <= j} R_ij (w_i - w_hat_i)|^2, so that w_hat_j is the grid value nearest to
    w_j + sum_{i < j} (w_i - w_hat_i) R_ij / R_jj. This is GPTQ's own recursion by the Cholesky factor of H^-1 (The
    Geometry of LLM Quantization, arXiv 2507.18553) without an inverse.

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
    factor, names = error_factor(hessian[order][:, order], damping), order.tolist()
    return _in_order(weight, order, factor, lambda t, i: columns.round(t[i], names[i]), block_size)


@torch.no_grad()
def gptq_in_groups(
    weight: Tensor,
    hessian: Tensor,
    fit: GroupFit,
    group_size: int,
    damping: float = 0.01,
    act_order: bool = True,
) -> Tensor:
    """As `gptq`, with the grid of each group of columns found when its first column is reached, as the source has it.

    By then the columns that are left make up for the errors of those that are done, see `as_left`.

    Args:
        weight, hessian, damping: as for `gptq`.
        fit: called once for each group.
        group_size: neighbouring columns that are a group; it divides `in`.
        act_order: take the groups with the largest inputs first, and so the columns within each.
    """
    diagonal = hessian.diagonal()
    order = _order_of_groups(diagonal, group_size) if act_order else torch.arange(len(diagonal), device=weight.device)
    factor, names = error_factor(hessian[order][:, order], damping), order.tolist()
    grids: dict[int, ColumnGrid] = {}

    def choose(t: Tensor, i: int) -> Tensor:
        group = names[i] // group_size
        if group not in grids:
            own, moved = slice(i, i + group_size), weight.to(torch.float32, copy=True)
            moved[:, order[own]] = as_left(moved[:, order[own]], t[own], factor[own, own])
            grids[group] = fit(moved, group)
        return grids[group].round(t[i], names[i])

    return _in_order(weight, order, factor, choose, group_size)


def _in_order(weight: Tensor, order: Tensor, factor: Tensor, choose: Choice, block_size: int) -> Tensor:
    """The recursion over the columns of `weight` in `order`; `factor` and `choose` count them in that order."""
    ordered = weight[:, order]
    found = column_by_column(ordered, ordered, factor, choose, block_size)
    return torch.empty_like(found).index_copy_(1, order, found)


def _order_of_groups(diagonal: Tensor, group_size: int) -> Tensor:
    """Groups by the sum of their entries, and columns within each, the largest first."""
    grouped = diagonal.view(-1, group_size)
    columns = torch.arange(len(diagonal), device=diagonal.device).view_as(grouped)
    within = columns.gather(1, grouped.argsort(dim=1, descending=True))
    return within[grouped.sum(1).argsort(descending=True)].flatten()


def column_by_column(
    weight: Tensor, target: Tensor, coupling: Tensor, choose: Choice, block_size: int, chunk: int = CHUNK
) -> Tensor:
    """Replace one column after the other, and let those after it take up the error.

    Column i becomes w_hat_i = choose(t, i); then t_j <- t_j + (w_i - w_hat_i) C_ij / C_jj for each j > i. Columns far
    off are brought up to date by products of whole chunks and blocks, which are far fewer passes over them.

    Args:
        weight: w, `[out, in]`.
        target: t, where each column would go to without the errors of those before it, `[out, in]`.
        coupling: C, `[in, in]`; what has zero on its diagonal is coupled to nothing.
        choose: called for each position; the columns up to the end of its chunk are up to date by then, and at the
            start of a block those of the block.
        block_size, chunk: columns whose updates of later ones are done together.

    Returns:
        w_hat, `[out, in]` in float32.
    """
    errors, t = (m.t().clone(memory_format=torch.contiguous_format).to(torch.float32) for m in (weight, target))
    diagonal = coupling.diagonal()
    coupling = coupling / diagonal.where(diagonal > 0, 1.0)

    def settle(first: int, last: int, width: int, *finer: int) -> None:
        for start in range(first, last, width):
            stop = min(start + width, last)
            if finer:
                settle(start, stop, *finer)
            else:
                t[start].copy_(choose(t, start))
                errors[start].sub_(t[start])
            t[stop:last].addmm_(coupling[start:stop, stop:last].t(), errors[start:stop])

    settle(0, len(t), block_size, chunk, 1)
    return t.t().contiguous()


def as_left(weight: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """The next columns as those before leave them: where they make up best for the errors so far, `[out, columns]`.

    With errors E of the columns Q that are done and F those that are left, that is w_F + E R_QF R_FF^-1, as
    H_QF H_FF^-1 = R_QF R_FF^-1. The recursion holds w_F + E R_QF diag(R_FF)^-1: its target of a column is complete only
    when the column is reached.

    Args:
        weight: the next columns, `[out, columns]` in float32.
        target: what the recursion holds of them, `[columns, out]`.
        factor: their block of R.
    """
    triangle = factor / factor.diagonal()
    shift = target.t() - weight
    return weight + torch.linalg.solve_triangular(triangle, shift, upper=True, left=False, unitriangular=True)


@torch.no_grad()
def output_errors(weight: Tensor, w_hat: Tensor, hessian: Tensor) -> Tensor:
    """(w - w_hat) H (w - w_hat)^T of every row, `[out]`: its squared error on the calibration data."""
    difference = weight.to(torch.float32) - w_hat.to(torch.float32)
    return ((difference @ hessian) * difference).sum(1)


def error_factor(hessian: Tensor, damping: float) -> Tensor:
    """R, upper triangular, of H = R R^T, in float32; features that are always zero count as uncorrelated.

    Raises:
        InputError: if the Hessian holds NaN or infinity, or cannot be inverted.
    """
    if not all_finite(hessian):
        raise InputError("The activations of the calibration data hold NaN or infinity, or their squares overflow.")
    # Backwards in both directions, upper triangular is lower triangular.
    h = hessian.to(torch.float32).flip(0, 1)
    diagonal = h.diagonal()
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(len(h), device=h.device)
    diagonal[diagonal == 0] = mean
    share = damping
    while share <= _MOST:
        lower, failed = torch.linalg.cholesky_ex(h + torch.diag((share * mean).expand(len(h))))
        if not failed:
            return lower.flip(0, 1)
        share = max(share, 1e-4) * _MORE
    raise InputError(
        "The Hessian is singular however much it is damped: take more, and more varied, calibration data "
        "(calibration_batches), or a larger damping."
    )
