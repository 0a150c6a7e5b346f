"""Evenly spaced levels around zero: binary, ternary, and the stretched grids of very few bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats.base import Format


@dataclass(frozen=True)
class LevelFormat(Format):
    """`count` levels with spacing 1, symmetric around zero: code c stands for c - (count - 1) / 2.

    Stretched elastic quantization of ParetoQ (arXiv 2502.02631): two bits are {-1.5, -0.5, 0.5, 1.5}, which spends no
    level on zero and none on one side alone; three levels are ternary, two are binary. Each level owns a cell of width
    1, so the grid covers [-count / 2, count / 2] and the outermost levels lie half a step inside it.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count not in range(2, 257):
            raise InputError(f"A level format has 2 to 256 levels, not {self.count}: set levels to 2, 3 or 2^bits.")

    @property
    def name(self) -> str:
        return f"levels{self.count}"

    @property
    def bits(self) -> int:
        return (self.count - 1).bit_length()

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, self.count - 1

    @property
    def saturates(self) -> bool:
        return True

    @property
    def holds_zero(self) -> bool:
        return self.count % 2 == 1

    def range(self) -> tuple[float, float]:
        return -self.count / 2, self.count / 2

    def with_bits(self, bits: int) -> Format:
        return LevelFormat(2**bits) if self.count == 2**self.bits and bits in range(1, 9) else super().with_bits(bits)

    def encode_(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        # Rounded before it is shifted, because adding count / 2 first would lose the low bits of v.
        half = self.count / 2
        if self.count % 2:
            cells = v.round_() if noise is None else v.add_(noise).floor_()
            half -= 0.5
        else:
            cells = v.floor_() if noise is None else v.sub_(0.5).add_(noise).floor_()
        return cells.add_(half).clamp_(0, self.count - 1)

    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        values = codes.to(torch.float32) if out is None else out.copy_(codes)
        return torch.sub(values, (self.count - 1) / 2, out=out)
