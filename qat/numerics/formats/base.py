"""What every format offers."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qat.errors import InputError
from qat.scratch import scratch


class Format(ABC):
    """A grid of values. Formats are immutable, hashable, and spelled by `name`, which `parse_format` reads back.

    Attributes:
        block: consecutive elements that share a code; 1 but for vector codebooks.
    """

    block: int = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """The spelling in configs and artifacts: `int4`, `fp8_e4m3`, `codebook16`."""

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
        """Whether values beyond `range` get no gradient."""

    @property
    def holds_zero(self) -> bool:
        """Whether zero is a value of the grid, for an integer zero point; of a table it depends on the table: no."""
        return True

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Lowest and highest value that the grid is for: the bounds that scales are computed for."""

    def with_bits(self, bits: int) -> "Format":
        """The grid of the same kind that has other bits.

        Raises:
            InputError: if there is none.
        """
        raise InputError(
            f"The grid {self.name} has {self.bits} bits and no others: take integers, quantizer@scheme.weight=lsq or "
            "minmax."
        )

    def clip(self, v: Tensor) -> Tensor:
        """Limit scaled values to the grid, differentiably, where the format saturates."""
        return v.clamp(*self.range()) if self.saturates else v

    def encode(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Scaled values `[groups, elements]` to codes `[groups, elements / block]`.

        Args:
            v: scaled values.
            codebook: `[rows, entries * block]`, for formats that need one.
            noise: uniform in [0, 1), shaped like `v`: round up with the probability that makes the expectation exact
                (stochastic rounding); None takes the nearest grid value.
        """
        return self.encode_(v.clone(), codebook, noise).to(self.code_dtype)

    @abstractmethod
    def encode_(self, v: Tensor, codebook: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """As `encode`, for kernels: codes as numbers of any type, and `v` may be overwritten."""

    @abstractmethod
    def decode(self, codes: Tensor, codebook: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Codes to grid values `[groups, elements]` in float32, in `out` if given; differentiable to the codebook."""

    def entry(self, codes: Tensor) -> Tensor:
        """Where each element's value stands in its codebook row: int64 `[groups, elements]`, until the next call."""
        return as_index(codes)


def as_index(codes: Tensor) -> Tensor:
    """`codes` as torch indexes with them; valid until the next call."""
    return scratch("index", codes.shape, torch.int64, codes.device).copy_(codes)
