"""What a product of codes multiplies, and what is done with its sums."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.numerics.formats import FloatFormat, Format


class Operand(NamedTuple):
    """A matrix `[rows, k]` whose scale does not vary along k, which is summed over.

    codes: `[rows, k]`; int8, or the bit patterns of small floats in uint8.
    scale: `[rows, 1]` or `[1, 1]` float32; None is one.
    format: signed integers, or floats of which torch has a dtype.
    """

    codes: Tensor
    scale: Tensor | None
    format: Format

    @property
    def is_float(self) -> bool:
        return isinstance(self.format, FloatFormat)

    def native(self) -> Tensor:
        """The codes, row-major, in the dtype that multiplies them: int8, or one of torch's 8-bit floats."""
        dtype = self.format.native if isinstance(self.format, FloatFormat) else torch.int8
        assert dtype is not None
        return self.codes.contiguous().view(dtype)

    def padded(self, rows: int, k: int) -> "Operand":
        """Zeros added until both sizes are multiples of `rows` and `k`; itself where they are."""
        more_rows, more_k = -len(self.codes) % rows, -self.codes.shape[1] % k
        if not more_rows and not more_k:
            return self
        scale = self.scale
        if scale is not None and len(scale) > 1:
            scale = F.pad(scale, (0, 0, 0, more_rows))
        return Operand(F.pad(self.codes, (0, more_k, 0, more_rows)), scale, self.format)


def scaled(sums: Tensor, a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """sums * s_a * s_b^T in float32, `[rows of a, rows of b]`, then in `dtype`."""
    # An integer times a float is a float32 in one pass; the second one needs no memory.
    y = sums.to(torch.float32) if a.scale is None else sums * a.scale
    return (y if b.scale is None else y.mul_(b.scale.reshape(1, -1))).to(dtype)
