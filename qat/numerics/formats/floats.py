"""Small floating-point numbers."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats.base import Format, as_index

# Highest finite code without its sign: e4m3 gives its last code to NaN, e5m2 its last four to infinity and NaN (OCP
# 8-bit Floating Point Specification 1.0); the smaller formats have numbers only (OCP Microscaling Formats 1.0).
_HIGHEST = {(4, 3): 0x7E, (5, 2): 0x7B, (2, 3): 0x1F, (3, 2): 0x1F, (2, 1): 0x07}
_NATIVE = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}


@dataclass(frozen=True)
class FloatFormat(Format):
    """Sign, exponent and mantissa: fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2 and fp4_e2m1, with subnormals.

    A code is the bit pattern of the number. Rounds to nearest, ties to even, and saturates at the largest finite
    number. Values beyond it keep their gradient: the scale of a float grid follows the data, so they lie there because
    the scale was rounded (microscaling rounds it down to a power of two), and would otherwise be frozen.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        if (self.exponent_bits, self.mantissa_bits) not in _HIGHEST:
            known = ", ".join(FloatFormat(*sizes).name for sizes in _HIGHEST)
            raise InputError(f"There is no float format {self.name}. There are {known}.")

    @property
    def name(self) -> str:
        return f"fp{self.bits}_e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, 2**self.bits - 1

    @property
    def saturates(self) -> bool:
        return False

    @property
    def native(self) -> torch.dtype | None:
        """The dtype of torch whose bit patterns are these codes, if there is one."""
        return _NATIVE.get((self.exponent_bits, self.mantissa_bits))

    @property
    def highest(self) -> int:
        """Code of the largest number."""
        return _HIGHEST[self.exponent_bits, self.mantissa_bits]

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal number: 1 - bias."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest_exponent(self) -> int:
        """Exponent of the largest number."""
        return (self.highest >> self.mantissa_bits) - 1 + self.least_exponent

    def range(self) -> tuple[float, float]:
        # Without tensors, so that compilers see numbers.
        steps = 2**self.mantissa_bits + self.highest % 2**self.mantissa_bits
        largest = steps * 2.0 ** (self.largest_exponent - self.mantissa_bits)
        return -largest, largest

    def encode_(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        if self.native is not None and noise is None:
            return v.clamp_(*self.range()).to(self.native).view(torch.uint8)
        negative = torch.signbit(v)
        # The float32 bit pattern gives the exponent exactly; below the normal numbers the spacing stays the same.
        exponent = (v.abs_().view(torch.int32) >> 23).sub_(127).clamp_(min=self.least_exponent)
        spacing = ((exponent + (127 - self.mantissa_bits)) << 23).view(torch.float32)
        steps = v.div_(spacing)
        steps = steps.round_() if noise is None else steps.add_(noise).floor_()
        # A carry into the next exponent is the right code by itself.
        magnitude = steps.add_(exponent.sub_(self.least_exponent), alpha=2.0**self.mantissa_bits)
        return magnitude.clamp_(max=self.highest).add_(negative, alpha=2.0 ** (self.bits - 1))

    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        values = _values_on(self, codes.device)
        return values[codes.long()] if out is None else torch.take(values, as_index(codes), out=out)


@lru_cache
def _values_on(format: FloatFormat, device: torch.device) -> Tensor:
    return _values(format).to(device)


@lru_cache
def _values(format: FloatFormat) -> Tensor:
    """The number that every code stands for; codes beyond the highest finite one saturate."""
    magnitude = torch.arange(2 ** (format.bits - 1)).clamp(max=format.highest)
    exponent, mantissa = magnitude >> format.mantissa_bits, magnitude % 2**format.mantissa_bits
    hidden = (exponent > 0) * 2**format.mantissa_bits
    power = exponent.clamp(min=1) - 1 + format.least_exponent - format.mantissa_bits
    values = torch.ldexp((hidden + mantissa).to(torch.float32), power)
    return torch.cat([values, -values])
