"""Vector codebooks: one code for several consecutive elements."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats.base import as_index
from qat.numerics.formats.codebook import CodebookFormat, check_codebook
from qat.scratch import scratch

# Elements whose distances to all entries are held at once.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class VectorFormat(CodebookFormat):
    """A table of `entries` vectors of `block` numbers: each code stands for `block` consecutive elements.

    Vector quantization (And the Bit Goes Down, arXiv 1907.05686; GPTVQ, arXiv 2402.15319): with two dimensions, 16
    entries cost 2 bits a weight. The codebook is `[rows, entries * block]`, one vector after the other; row r serves
    `groups / rows` consecutive groups. As any codebook it does not clip.
    """

    block: int = 2

    def __post_init__(self) -> None:
        if self.entries not in range(2, 257) or self.block not in (2, 4, 8):
            raise InputError(f"{self.name}: a vector codebook has 2 to 256 entries of 2, 4 or 8 dimensions.")

    @property
    def name(self) -> str:
        return f"vector{self.entries}x{self.block}"

    def encode_(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        if noise is not None:
            raise InputError(f"{self.name} has no stochastic rounding: neighbours in a plane are not two. Use nearest.")
        table = check_codebook(self, codebook).view(-1, self.entries, self.block)
        vectors = v.reshape(len(table), -1, self.block)
        codes = torch.empty(vectors.shape[:2], dtype=torch.int64, device=v.device)
        # |v - c|^2 = |v|^2 - 2 (v c - |c|^2 / 2), and |v|^2 is the same for every c.
        half_norms = table.square().sum(2)[:, None] / 2
        step = max(1, _AT_ONCE // (self.entries * len(table)))
        for part, own in zip(vectors.split(step, dim=1), codes.split(step, dim=1), strict=True):
            torch.argmax(torch.baddbmm(-half_norms, part, table.transpose(1, 2)), dim=2, out=own)
        return codes.view(v.shape[0], -1)

    def entry(self, codes: Tensor) -> Tensor:
        first = as_index(codes).mul_(self.block)[..., None]
        entries = scratch("entries", torch.Size((*codes.shape, self.block)), torch.int64, codes.device)
        torch.add(first, torch.arange(self.block, device=codes.device), out=entries)
        return entries.view(*codes.shape[:-1], -1)
