"""The grid values around an element, and the outermost ones: what its rounding can become."""

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats import Format
from qat.numerics.qtensor import ViewParams, scale_down


@torch.no_grad()
def gaps(view: Tensor, params: ViewParams, format: Format) -> Tensor:
    """The distance between the two grid values around each element; beyond an end of the grid, of the two there.

    For integers it is the scale. On an even grid half of it leads an element to either of the two and no further;
    where gaps differ, a wide one may lead beyond a narrow one next to it.

    Args:
        view: `[groups, elements]`.
        params: the grid, with a codebook where the format has one.
        format: of one code for each element.

    Returns:
        `[groups, elements]` in float32, in the unit of `view`.

    Raises:
        InputError: if a code stands for several elements.
    """
    if format.block > 1:
        raise InputError(
            f"One code of {format.name} stands for {format.block} weights, which have no grid values of their own "
            "to be rounded to: take a scalar grid, as quantizer@scheme.weight=kmeans."
        )
    table = _table(format, params)
    v = scale_down(view, params).reshape(len(table), -1)
    above = torch.searchsorted(table.contiguous(), v.contiguous()).clamp_(1, table.shape[1] - 1)
    return (table.gather(1, above) - table.gather(1, above - 1)).view(view.shape) * params.scale


def clipped(view: Tensor, params: ViewParams, format: Format) -> Tensor:
    """`view` `[groups, elements]` between the outermost grid values, differentiable to it and to the scale.

    Formats that saturate do that themselves. The others let the gradient of what lies beyond the grid pass, and with
    it one of the scale that is not its own: there x_hat = end * scale, whatever x is.
    """
    if format.saturates:
        return view
    table = _table(format, params)
    low, high = (end.repeat_interleave(len(view) // len(table), 0) for end in (table[:, :1], table[:, -1:]))
    return view.clamp(low * params.scale, high * params.scale)


def _table(format: Format, params: ViewParams) -> Tensor:
    """All grid values, ascending: the codebook, or one row of them."""
    if params.codebook is not None:
        return params.codebook
    low, high = format.code_range
    return format.decode(torch.arange(low, high + 1, device=params.scale.device)[None]).unique()[None]
