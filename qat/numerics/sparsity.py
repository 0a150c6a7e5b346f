"""Which weights to prune, and what becomes of the others: magnitude, Wanda and SparseGPT. Functions of tensors only.

A mask is a boolean matrix `[out, in]`, true where the weight is kept.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.columns import Columns
from qat.numerics.gptq import CHUNK, as_left, column_by_column, error_factor

SCOPES = ("row", "matrix")


@dataclass(frozen=True)
class Pattern:
    """Where the zeros may lie.

    Attributes:
        kept, of: at most `kept` of each `of` consecutive weights of a row are not zero; None: zeros lie anywhere.
    """

    kept: int | None = None
    of: int = 1

    def __str__(self) -> str:
        return "unstructured" if self.kept is None else f"{self.kept}:{self.of}"


def parse_pattern(name: str, sparsity: float) -> Pattern:
    """Read `unstructured`, `2:4` or `4:8`.

    Raises:
        InputError: if no pattern is spelled like this, or it does not leave out the share `sparsity`.
    """
    if not isinstance(sparsity, int | float) or not 0 < sparsity < 1:
        raise InputError(f"sparsity is {sparsity}; it is the share of zeros, between 0 and 1: set it to 0.5.")
    if name == "unstructured":
        return Pattern()
    match = re.fullmatch(r"(\d+):(\d+)", str(name))
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise InputError(f"There is no pattern '{name}'. Choose from: unstructured, 2:4, 4:8.")
    pattern = Pattern(int(match[1]), int(match[2]))
    own = 1 - int(match[1]) / pattern.of
    if not math.isclose(own, sparsity, abs_tol=1e-6):
        raise InputError(
            f"pattern={name} prunes {own:g} of the weights, not {sparsity:g}: set sparsity={own:g}, or take "
            "pattern=unstructured."
        )
    return pattern


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W| in float32: Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626."""
    return weight.detach().to(torch.float32).abs()


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| |x_j|: the magnitude of a weight times the norm of the input that it multiplies.

    A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695.

    Args:
        weight: `[out, in]`.
        squares: sum of the squares of each input feature over the calibration data, `[in]`.

    Returns:
        `[out, in]` in float32.
    """
    return magnitude_scores(weight) * squares.to(torch.float32).sqrt()


@torch.no_grad()
def mask_of(scores: Tensor, pattern: Pattern, sparsity: float, scope: str = "row") -> Tensor:
    """Keep the highest `scores`, exactly as many as `pattern` and `sparsity` say.

    Args:
        scores: `[out, in]`.
        pattern: where zeros may lie.
        sparsity: share of zeros; N:M patterns have their own.
        scope: what unstructured scores are compared within: `row` or the whole `matrix`.

    Returns:
        The mask, `[out, in]`, true where the weight is kept.

    Raises:
        InputError: if the groups of the pattern do not divide a row.
    """
    if pattern.kept is not None:
        check_divides(pattern, scores.shape[1])
        return _highest(scores.reshape(-1, pattern.of), pattern.kept).view(scores.shape)
    if scope not in SCOPES:
        raise InputError(f"Scores are compared within a row or a matrix, not '{scope}': set scope=row.")
    view = scores if scope == "row" else scores.reshape(1, -1)
    return _highest(view, view.shape[1] - round(sparsity * view.shape[1])).view(scores.shape)


@torch.no_grad()
def gradual_mask(scores: Tensor, pattern: Pattern, target: float, sparsity: float, scope: str = "row") -> Tensor:
    """The mask on the way to the sparsity `target` when `sparsity` <= target of the weights are pruned.

    Only what `mask_of` would prune in the end is pruned, the lowest scores first; so it becomes N:M little by little.

    Args:
        scores: `[out, in]`, not negative.
    """
    last = mask_of(scores, pattern, target, scope)
    if sparsity >= target:
        return last
    return mask_of(torch.where(last, torch.inf, scores), Pattern(), sparsity, "matrix") | last


def check_divides(pattern: Pattern, columns: int) -> None:
    """Refuse rows that are no whole number of groups."""
    if columns % pattern.of:
        raise InputError(
            f"pattern={pattern} has groups of {pattern.of}, which do not divide {columns} columns: exclude the layer, "
            "or take pattern=unstructured."
        )


class MaskedColumns:
    """Columns in which pruned weights are zero, and the others on the grid; in the place of `Columns`.

    With it `gptq` quantizes a matrix that was pruned before: the errors of both are taken up by the columns to come.
    """

    def __init__(self, columns: Columns, mask: Tensor) -> None:
        self._columns, self._kept = columns, mask.t().contiguous()

    def round(self, values: Tensor, column: int) -> Tensor:
        """As `Columns.round`."""
        return _rounded(values, self._kept[column], column, self._columns)


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    sparsity: float,
    columns: Columns | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune, and in the same pass quantize, so that the product with the calibration data is kept.

    SparseGPT, arXiv 2301.00774. The loop is GPTQ's: the error of column j, pruned or rounded, is spread over the
    columns after it. What to prune is decided as the loop gets there, by the error that it would cause, (w_ij R_jj)^2
    with H = R R^T and w as the columns before have left it: the lowest in each block of columns, or in each group of an
    N:M pattern.

    Args:
        weight: `[out, in]`.
        hessian: X^T X, `[in, in]`, up to a factor.
        pattern: where zeros may lie.
        sparsity: share of zeros; N:M patterns have their own.
        columns: the grid of the weights that are kept; None leaves them in full precision.
        damping: as for `gptq`.
        block_size: columns whose updates of later ones are done together, and that compete for being kept; rounded up
            to whole groups of the pattern.

    Returns:
        w_hat `[out, in]` in float32, zero where pruned; and the mask.

    Raises:
        InputError: as `gptq`; or if the groups of the pattern do not divide a row.
    """
    check_divides(pattern, weight.shape[1])
    block_size = math.ceil(block_size / pattern.of) * pattern.of
    factor = error_factor(hessian, damping)
    scale = factor.diagonal()[:, None]
    together = block_size if pattern.kept is None else pattern.of
    kept = torch.empty(weight.shape[::-1], dtype=torch.bool, device=weight.device)

    def choose(t: Tensor, i: int) -> Tensor:
        if i % together == 0:
            own = slice(i, i + together)
            left = as_left(weight[:, own].to(torch.float32), t[own], factor[own, own]).t()
            kept[own] = mask_of((left * scale[own]).square().t(), pattern, sparsity, "matrix").t()
        return _rounded(t[i], kept[i], i, columns)

    # A group of the pattern must be up to date as a whole when its first column is reached.
    chunk = math.ceil(CHUNK / pattern.of) * pattern.of
    return column_by_column(weight, weight, factor, choose, block_size, chunk), kept.t().contiguous()


def _rounded(values: Tensor, kept: Tensor, column: int, columns: Columns | None) -> Tensor:
    on_grid = values if columns is None else columns.round(values, column)
    return torch.where(kept, on_grid, 0.0)


def _highest(view: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest of each row of `view`; of equal ones the first."""
    if count == 0:
        return torch.zeros(view.shape, dtype=torch.bool, device=view.device)
    least = view.kthvalue(view.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = view > least, view == least
    missing = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= missing))
