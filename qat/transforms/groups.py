"""Scales of groups of columns that are found in turn, each from what GPTQ left of its weights until it got there."""

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.columns import ColumnGrid
from qat.numerics.granularity import PerGroup
from qat.numerics.qtensor import ViewParams
from qat.quantizers import Quantizer
from qat.transforms.stack import Stack

_TOGETHER = "Scales of {grid} cannot be found one group after the other: {reason}. Set static_groups=true."


def group_size_of(stack: Stack) -> int | None:
    """How many columns share a scale; None where it is all of them, or a scale is shared by rows."""
    granularity = stack.quantizers[0].granularity
    return granularity.group_size if isinstance(granularity, PerGroup) else None


@torch.no_grad()
def fit_group(stack: Stack, importance: Tensor | None, weight: Tensor, group: int) -> ColumnGrid:
    """Fit the scales of one group of columns to `weight`; those of the others stay.

    Args:
        stack: its quantizers get the scales.
        importance: how much the error of each column counts, `[in]`; None: all alike.
        weight: `[out, in]`, with the columns of the group as they are now.
        group: its number.

    Returns:
        The grid of every column.

    Raises:
        InputError: if a quantizer cannot hold scales that were not found together.
    """
    for quantizer, own in zip(stack.quantizers, stack.split(weight), strict=True):
        _refit(quantizer, own, None if importance is None else importance.expand_as(own), group)
    return stack.columns()


def _refit(quantizer: Quantizer, weight: Tensor, importance: Tensor | None, group: int) -> None:
    before = quantizer.ready_qparams(quantizer.masked(weight)).for_view()
    before = ViewParams(*(None if field is None else field.clone() for field in before))  # type: ignore[arg-type]
    quantizer.initialize(weight, importance)
    found = quantizer.ready_qparams(quantizer.masked(weight)).for_view()
    merged = [_merged(quantizer, *pair, len(weight), group) for pair in zip(before, found, strict=True)]
    if not quantizer.adopt(ViewParams(*merged)):  # type: ignore[arg-type]
        raise InputError(_TOGETHER.format(grid=quantizer.format.name, reason="they are quantized themselves"))


def _merged(quantizer: Quantizer, before: Tensor | None, found: Tensor | None, rows: int, group: int) -> Tensor | None:
    """`before` with those of `group` as in `found`; both `[rows * groups, n]`, or of what all groups share."""
    if before is None or found is None or torch.equal(before, found):
        return before
    if len(before) != rows * quantizer.param_shape[-1]:
        raise InputError(_TOGETHER.format(grid=quantizer.format.name, reason="the groups of a row share a codebook"))
    merged = before.view(rows, -1, before.shape[1])
    merged[:, group] = found.view_as(merged)[:, group]
    return merged.view_as(before)
