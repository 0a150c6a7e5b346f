"""Codes of what a product multiplies, in plain PyTorch: the definition, and what a compiler fuses on a CPU.

Scales are symmetric: of each row max|x| over the highest value of the grid, rounded up to what storage holds.
"""

import torch
from torch import Tensor

from qat.numerics.dynamic import absmax_params
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity, PerToken
from qat.numerics.qtensor import scale_down

Found = tuple[Tensor, Tensor]


def row_codes(
    x: Tensor,
    factor: Tensor | None,
    noise: Tensor | None,
    scale_dtype: torch.dtype,
    format: Format,
    granularity: Granularity | None = None,
) -> Found:
    """Codes `[rows, k]` and scales `[rows, 1]` of x * factor.

    Args:
        x: `[rows, k]`.
        factor: `[1, k]` or `[1, 1]` float32; None is one.
        noise: as `Format.encode` takes it, `[rows, k]`; None rounds to nearest.
        scale_dtype: what the scale is rounded up to.
        format: integers or small floats.
        granularity: who shares a scale, if not each row; the scale is `[groups, 1]` then.
    """
    return _codes(x if factor is None else x.to(torch.float32) * factor, noise, scale_dtype, format, granularity)


def column_codes(
    x: Tensor,
    factor: Tensor,
    noise: Tensor | None,
    scale_dtype: torch.dtype,
    format: Format,
    granularity: Granularity | None = None,
) -> Found:
    """Codes `[k, rows]` and scales `[k, 1]` of (x * factor)^T: as `row_codes`, for the columns of x.

    Args:
        factor: `[rows, 1]` or `[1, 1]` float32.
        noise: `[k, rows]`.
    """
    return _codes((x.to(torch.float32) * factor).T, noise, scale_dtype, format, granularity)


def _codes(
    x: Tensor, noise: Tensor | None, scale_dtype: torch.dtype, format: Format, granularity: Granularity | None
) -> Found:
    view = (PerToken() if granularity is None else granularity).view(x)
    params = absmax_params(view, format, scale_dtype)
    v = scale_down(view, params)
    codes = format.encode_(v, None, None if noise is None else noise.reshape(v.shape)).to(format.code_dtype)
    return codes.view(x.shape).contiguous(), params.scale


def transposed(codes: Tensor) -> Tensor:
    """`codes` `[rows, k]` as `[k, rows]`, contiguous."""
    return codes.T.contiguous()
