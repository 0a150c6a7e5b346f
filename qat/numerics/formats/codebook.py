"""Tables of values: NF4, learned k-means, any lookup table."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats.base import Format
from qat.scratch import scratch

# Up to here comparing against every boundary beats a binary search on a CPU (8x at 8 entries).
_MOST_ENTRIES_COMPARED = 32


@dataclass(frozen=True)
class CodebookFormat(Format):
    """A table of `entries` ascending values, given with each call: NF4, learned k-means, any lookup table.

    The codebook is `[rows, entries]`; row r serves `groups / rows` consecutive groups. A codebook does not clip: a
    clamp to its ends would add to their gradient and freeze every weight beyond them.
    """

    entries: int

    def __post_init__(self) -> None:
        if self.entries not in range(2, 257):
            raise InputError(f"Codebooks have 2 to 256 entries, not {self.entries}: set bits to one of 1 ... 8.")

    @property
    def name(self) -> str:
        return f"codebook{self.entries}"

    @property
    def bits(self) -> int:
        return (self.entries - 1).bit_length()

    @property
    def code_range(self) -> tuple[int, int]:
        return 0, self.entries - 1

    @property
    def saturates(self) -> bool:
        return False

    @property
    def holds_zero(self) -> bool:
        return False

    def range(self) -> tuple[float, float]:
        # Codebooks are kept relative to the absolute maximum of what shares a scale.
        return -1.0, 1.0

    def encode_(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        table = check_codebook(self, codebook)
        flat = v.reshape(table.shape[0], -1)
        if noise is not None:
            return _between(flat, table, noise.reshape(flat.shape)).view(v.shape)
        boundaries = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
        if self.entries > _MOST_ENTRIES_COMPARED:
            return v.copy_(torch.searchsorted(boundaries, flat.contiguous(), out_int32=True).view(v.shape))
        # The code is the number of boundaries below v, counted in floats: twice as fast as in bytes on a CPU.
        first, *others = boundaries.split(1, dim=1)
        count, above = (scratch(name, flat.shape, torch.float32, v.device) for name in ("count", "above"))
        torch.gt(flat, first, out=count)
        for boundary in others:
            count += torch.gt(flat, boundary, out=above)
        return v.copy_(count.view(v.shape))

    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        table = check_codebook(self, codebook)
        entry = self.entry(codes)
        flat = entry.view(table.shape[0], -1)
        if out is None:  # autograd keeps the index, which is scratch
            return table.gather(1, flat.clone()).view(entry.shape)
        torch.gather(table, 1, flat, out=out.view(flat.shape))
        return out


def check_codebook(format: Format, codebook: Tensor | None) -> Tensor:
    """`codebook`, which must be `[rows, entries * block]` for `format`."""
    width = (format.code_range[1] + 1) * format.block
    if codebook is None or codebook.ndim != 2 or codebook.shape[1] != width:
        found = "none" if codebook is None else list(codebook.shape)
        raise InputError(f"{format.name} needs a codebook [rows, {width}], got {found}.")
    return codebook


def _between(v: Tensor, table: Tensor, noise: Tensor) -> Tensor:
    """The entry below each of `v` or the one above it, at random, so that the expectation is v."""
    below = (torch.searchsorted(table, v, right=True) - 1).clamp_(0, table.shape[1] - 2)
    low, high = table.gather(1, below), table.gather(1, below + 1)
    return below + (v - low > noise * (high - low))
