"""Granularity: which elements of a tensor share a scale.

Every granularity offers one view, `[groups, elements]`, and all arithmetic of the project happens on that view.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor
from torch.nn import functional as F

from qat.errors import InputError, nearest

Shape = Sequence[int]

# How many sizes to offer at least.
_ENOUGH = 3


class Granularity(ABC):
    """A partition of a tensor into groups; immutable, and spelled by `str()`, which `parse_granularity` reads back."""

    @abstractmethod
    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        """Shape of the scale of a tensor of `shape`, one value a group."""

    @abstractmethod
    def view(self, x: Tensor) -> Tensor:
        """View `x` of any shape as `[groups, elements]`, groups in the order of `param_shape`."""

    @abstractmethod
    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        """Undo `view` for a tensor of `shape`."""

    def of_codes(self, block: int) -> "Granularity":
        """The same partition of codes, each of which stands for `block` consecutive elements of the last dimension.

        Raises:
            InputError: if a code would stand for elements of two groups.
        """
        if block > 1:
            raise InputError(f"Vector codebooks take per_tensor, per_channel, per_token or per_group_N, not {self}.")
        return self


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One group for everything."""

    def of_codes(self, block: int) -> Granularity:
        return self

    def __str__(self) -> str:
        return "per_tensor"

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        return (1,) * len(shape)

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        return grouped.reshape(tuple(shape))


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One group for each index of `axis`: rows of a weight `[out, in]` (axis 0), features of `[..., features]` (-1)."""

    axis: int = 0

    def __str__(self) -> str:
        return "per_channel" if self.axis == 0 else f"per_channel_{self.axis}"

    def of_codes(self, block: int) -> Granularity:
        return self if self.axis == 0 else super().of_codes(block)

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        if not -len(shape) <= self.axis < len(shape):
            raise InputError(f"{self}: a tensor of shape {list(shape)} has no dimension {self.axis}.")
        sizes = [1] * len(shape)
        sizes[self.axis] = shape[self.axis]
        return tuple(sizes)

    def view(self, x: Tensor) -> Tensor:
        first = x.movedim(self.axis, 0)
        return first.reshape(len(first), math.prod(first.shape[1:]))

    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        sizes = list(shape)
        channels = sizes.pop(self.axis)
        return grouped.reshape(channels, *sizes).movedim(0, self.axis)


@dataclass(frozen=True)
class PerToken(Granularity):
    """One group for each vector along the last dimension: every token of `[batch, tokens, features]` on its own."""

    def __str__(self) -> str:
        return "per_token"

    def of_codes(self, block: int) -> Granularity:
        return self

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        return (*shape[:-1], 1)

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        return grouped.reshape(tuple(shape))


@dataclass(frozen=True)
class PerGroup(Granularity):
    """`group_size` consecutive elements of the last dimension share a scale."""

    group_size: int

    def __str__(self) -> str:
        return f"per_group_{self.group_size}"

    def of_codes(self, block: int) -> Granularity:
        return PerGroup(self.group_size // block) if self.group_size % block == 0 else super().of_codes(block)

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        _check_divides(self.group_size, shape[-1], "group size")
        return (*shape[:-1], shape[-1] // self.group_size)

    def view(self, x: Tensor) -> Tensor:
        _check_divides(self.group_size, x.shape[-1], "group size")
        return x.reshape(-1, self.group_size)

    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        return grouped.reshape(tuple(shape))


@dataclass(frozen=True)
class PerBlock(Granularity):
    """Tiles of `rows x columns` of the last two dimensions share a scale."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"per_block_{self.rows}x{self.columns}"

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        if len(shape) < 2:
            raise InputError(
                f"{self} needs at least two dimensions, got shape {list(shape)}: take per_token or per_group_N."
            )
        _check_divides(self.rows, shape[-2], "block height")
        _check_divides(self.columns, shape[-1], "block width")
        return (*shape[:-2], shape[-2] // self.rows, shape[-1] // self.columns)

    def view(self, x: Tensor) -> Tensor:
        *_, tall, wide = self.param_shape(x.shape)
        tiles = x.reshape(math.prod(x.shape[:-2]), tall, self.rows, wide, self.columns).transpose(2, 3)
        return tiles.reshape(-1, self.rows * self.columns)

    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        *_, tall, wide = self.param_shape(shape)
        tiles = grouped.reshape(math.prod(shape[:-2]), tall, wide, self.rows, self.columns).transpose(2, 3)
        return tiles.reshape(tuple(shape))


@dataclass(frozen=True)
class PerFlatGroup(Granularity):
    """`group_size` consecutive elements of the flattened tensor share a scale; the last group may be short.

    The block-wise layout of bitsandbytes. The view pads the short group with zeros, which move neither an absolute
    maximum nor an error where zero is on the grid; a mean they do.
    """

    group_size: int

    def __str__(self) -> str:
        return f"per_flat_group_{self.group_size}"

    def param_shape(self, shape: Shape) -> tuple[int, ...]:
        return (math.ceil(math.prod(shape) / self.group_size),)

    def view(self, x: Tensor) -> Tensor:
        (groups,) = self.param_shape(x.shape)
        return F.pad(x.reshape(-1), (0, groups * self.group_size - x.numel())).view(groups, self.group_size)

    def unview(self, grouped: Tensor, shape: Shape) -> Tensor:
        return grouped.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


_SPELLINGS = {
    "per_tensor": PerTensor,
    "per_channel": PerChannel,
    r"per_channel_(-?\d+)": PerChannel,
    "per_token": PerToken,
    r"per_group_(\d+)": PerGroup,
    r"per_block_(\d+)x(\d+)": PerBlock,
    r"per_flat_group_(\d+)": PerFlatGroup,
}


@lru_cache
def parse_granularity(name: "str | Granularity") -> Granularity:
    """Read a granularity's spelling back: `parse_granularity("per_group_64") == PerGroup(64)`.

    Raises:
        InputError: if no granularity is spelled like this.
    """
    if isinstance(name, Granularity):
        return name
    for spelling, kind in _SPELLINGS.items():
        match = re.fullmatch(spelling, str(name))
        if match:
            numbers = [int(number) for number in match.groups()]
            if kind is not PerChannel and any(number < 1 for number in numbers):
                raise InputError(f"Granularity '{name}': sizes start at 1.")
            return kind(*numbers)
    examples = ["per_tensor", "per_channel", "per_token", "per_group_64", "per_block_32x32", "per_flat_group_64"]
    raise InputError(f"There is no granularity '{name}'.{nearest(str(name), examples)}")


def refuse_padding(granularity: Granularity, shape: Shape) -> None:
    """For rules that would count padding as data: refuse a tensor of `shape` in whose view a group is padded.

    Raises:
        InputError: if there is such a group.
    """
    if isinstance(granularity, PerFlatGroup):
        _check_divides(granularity.group_size, math.prod(shape), "flat group size")


def _check_divides(size: int, length: int, what: str) -> None:
    if length % size:
        working = _usual([n for n in range(1, length + 1) if length % n == 0])
        raise InputError(f"The {what} {size} does not divide {length}. Sizes that do: {', '.join(map(str, working))}.")


def _usual(sizes: list[int]) -> list[int]:
    """Those of `sizes` that one would choose, or all where they are next to none."""
    usual = [size for size in sizes if 8 <= size <= 512]
    return usual if len(usual) >= _ENOUGH else sizes
