"""Formats: which values a code can stand for.

A format turns scaled values into codes and codes into grid values. It knows neither scales nor who shares them.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qat.errors import InputError
from qat.scratch import scratch

# Up to here comparing against every boundary beats a binary search on a CPU (8x at 8 entries).
_MOST_ENTRIES_COMPARED = 32


class Format(ABC):
    """A grid of values. Formats are immutable, hashable, and spelled by `name`, which `parse_format` reads back."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The spelling in configs and artifacts: `int4`, `uint4`, `codebook16`."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Stored bits of one code."""

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code."""

    @property
    def code_dtype(self) -> torch.dtype:
        """Type that holds one unpacked code."""
        return torch.int8 if self.code_range[0] < 0 else torch.uint8

    @property
    @abstractmethod
    def saturates(self) -> bool:
        """Whether values beyond the grid are clipped, and so get no gradient."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Lowest and highest grid value, the bounds that scales are computed for."""

    def clip(self, v: Tensor) -> Tensor:
        """Limit scaled values to the grid, differentiably, where the format saturates."""
        return v.clamp(*self.range()) if self.saturates else v

    def encode(self, v: Tensor, codebook: Tensor | None = None) -> Tensor:
        """Scaled values `[groups, elements]` to the codes of the nearest grid values."""
        return self.encode_(v.clone(), codebook).to(self.code_dtype)

    @abstractmethod
    def encode_(self, v: Tensor, codebook: Tensor | None = None) -> Tensor:
        """As `encode`, for kernels: codes as floats, and `v` may be overwritten by them."""

    @abstractmethod
    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Codes `[groups, elements]` to grid values in float32, in `out` if given; differentiable to the codebook."""


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

    def encode_(self, v: Tensor, codebook: Tensor | None = None) -> Tensor:
        return v.round_().clamp_(*self.code_range)

    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return codes.to(torch.float32) if out is None else out.copy_(codes)


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

    def range(self) -> tuple[float, float]:
        # Codebooks are kept relative to the absolute maximum of what shares a scale.
        return -1.0, 1.0

    def encode_(self, v: Tensor, codebook: Tensor | None = None) -> Tensor:
        table = self._check(codebook)
        boundaries = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
        flat = v.reshape(table.shape[0], -1)
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
        table = self._check(codebook)
        flat = codes.reshape(table.shape[0], -1)
        if out is None:
            return table.gather(1, flat.long()).view(codes.shape)
        torch.gather(table, 1, as_index(flat), out=out.view(flat.shape))
        return out

    def _check(self, codebook: Tensor | None) -> Tensor:
        if codebook is None or codebook.ndim != 2 or codebook.shape[1] != self.entries:
            found = "none" if codebook is None else list(codebook.shape)
            raise InputError(f"{self.name} needs a codebook [rows, {self.entries}], got {found}.")
        return codebook


def as_index(codes: Tensor) -> Tensor:
    """`codes` as torch indexes with them; valid until the next call."""
    return scratch("index", codes.shape, torch.int64, codes.device).copy_(codes)


@lru_cache
def parse_format(name: str) -> Format:
    """Read a format's name back: `parse_format("int4") == IntFormat(4)`.

    Raises:
        InputError: if no format has this name.
    """
    match = re.fullmatch(r"(int|uint|codebook)(\d+)", name)
    if not match:
        raise InputError(
            f"There is no format '{name}'. Formats are int2 ... int8, uint2 ... uint8, codebook2 ... codebook256."
        )
    kind, number = match[1], int(match[2])
    return CodebookFormat(number) if kind == "codebook" else IntFormat(number, signed=kind == "int")
