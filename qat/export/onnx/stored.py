"""Which type of ONNX holds the codes of a format.

ONNX has integers of 2 (opset 25), 4 and 8 bits and the 8-bit floats. Codes of other widths take the next wider type:
what they stand for is the same to the bit. Levels become integers: code c of n levels stands for c - (n - 1) / 2, which
is an integer if n is odd, and half of one, 2 c - (n - 1), if it is even. Then the scale is halved, which is exact.
"""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from qat.numerics.formats import FloatFormat, Format, IntFormat, LevelFormat

# The first opset with integers of 4 bits and with scales for blocks, and the first one with integers of 2 bits.
OLDEST_OPSET = 21
_OPSET_OF_INT2 = 25
_FLOATS = {torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN, torch.float8_e5m2: ir.DataType.FLOAT8E5M2}


@dataclass(frozen=True)
class StoredCodes:
    """How codes become numbers of ONNX.

    Attributes:
        dtype: that of the numbers.
        factor, shift: a number is code * factor - shift, and its scale is the code's over `factor`.
    """

    dtype: ir.DataType
    factor: int = 1
    shift: int = 0

    def numbers(self, codes: Tensor) -> Tensor:
        """The bit pattern of the number of every code, uint8, in the lowest bits."""
        if self.dtype in _FLOATS.values():
            return codes
        numbers = codes.to(torch.int16) * self.factor - self.shift
        return (numbers & 2**self.dtype.bitwidth - 1).to(torch.uint8)

    def codes(self, numbers: Tensor, format: Format) -> Tensor:
        """The inverse of `numbers`; a bit pattern that no code has gives one beyond `format.code_range`."""
        if self.dtype in _FLOATS.values():
            return numbers
        wide = numbers.to(torch.int16)
        if self.dtype.is_signed():
            wide = torch.where(wide >= 2 ** (self.dtype.bitwidth - 1), wide - 2**self.dtype.bitwidth, wide)
        return (wide + self.shift).div(self.factor, rounding_mode="floor").to(format.code_dtype)


def stored_codes(format: Format, opset: int) -> StoredCodes | None:
    """How codes of `format` are stored under the operators of `opset`; None where no type holds them."""
    if isinstance(format, FloatFormat):
        return StoredCodes(_FLOATS[format.native]) if format.native in _FLOATS else None
    if not isinstance(format, IntFormat | LevelFormat):
        return None
    factor, shift = (1, 0) if isinstance(format, IntFormat) else _of_levels(format.count)
    low, high = (code * factor - shift for code in format.code_range)
    dtype = _smallest(low, high, opset)
    return None if dtype is None else StoredCodes(dtype, factor, shift)


def _of_levels(count: int) -> tuple[int, int]:
    factor = 2 - count % 2
    return factor, (count - 1) * factor // 2


def _smallest(low: int, high: int, opset: int) -> ir.DataType | None:
    """The integer type of the fewest bits that holds `low` to `high`."""
    for bits in (2, 4, 8):
        least, most = (0, 2**bits - 1) if low >= 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if least <= low and high <= most and (bits > 2 or opset >= _OPSET_OF_INT2):
            return ir.DataType[f"{'U' if low >= 0 else ''}INT{bits}"]
    return None
