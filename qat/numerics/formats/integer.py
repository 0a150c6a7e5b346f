"""Consecutive integers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats.base import Format


@dataclass(frozen=True)
class IntFormat(Format):
    """Consecutive integers: signed `[-2^(b-1), 2^(b-1) - 1]`, or unsigned `[0, 2^b - 1]` for use with a zero point."""

    width: int
    signed: bool = True

    def __post_init__(self) -> None:
        if self.width not in range(2, 9):
            raise InputError(f"Integer formats have 2 to 8 bits, not {self.width}: set bits to one of 2 ... 8.")

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.width}"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def code_range(self) -> tuple[int, int]:
        low = -(2 ** (self.width - 1)) if self.signed else 0
        return low, low + 2**self.width - 1

    @property
    def saturates(self) -> bool:
        return True

    def range(self) -> tuple[float, float]:
        low, high = self.code_range
        return float(low), float(high)

    def with_bits(self, bits: int) -> Format:
        return IntFormat(bits, self.signed)

    def encode_(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        whole = v.round_() if noise is None else v.add_(noise).floor_()
        return whole.clamp_(*self.code_range)

    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return codes.to(torch.float32) if out is None else out.copy_(codes)
