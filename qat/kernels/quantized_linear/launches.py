"""How a packed weight can be multiplied: the kernels, and what of their launch can be chosen."""

from typing import NamedTuple

from qat.kernels.quantized_linear.weight import TiledWeight


class Skinny(NamedTuple):
    """`skinny.py`: warps of a program, those that share a row's columns, registers a thread, and what is ahead."""

    warps: int = 4
    warps_k: int = 4
    registers: int = 168
    ahead_x: bool = False


class Ring(NamedTuple):
    """`ring.py`: as `Skinny`; `stages` steps are on their way."""

    warps: int = 4
    warps_k: int = 4
    registers: int = 128
    stages: int = 2


class Wide(NamedTuple):
    """`wide.py`: rows and tokens of a tile, parts of the columns with programs of their own, stages of the pipeline.

    Four `warps` hold 64 rows: with eight, two groups of four multiply at the same time. `depth` is how many tiles of 64
    columns, two or four, are loaded and decoded at a time.
    """

    rows: int = 64
    tokens: int = 64
    splits: int = 1
    stages: int = 3
    warps: int = 4
    depth: int = 2


class Dequantize(NamedTuple):
    """The weight as a matrix, in memory that all layers share, and cuBLAS."""


Choice = Skinny | Ring | Wide | Dequantize
KERNELS = {kernel.__name__: kernel for kernel in (Skinny, Ring, Wide, Dequantize)}


class Key(NamedTuple):
    """What a choice depends on, of a weight.

    has_zeros: whether zero points are stored.
    wide_scales: whether scales of groups take 32 bits and not 16.
    own_tables: whether each row has its own.
    """

    rows: int
    columns: int
    bits: int
    kind: str
    group: int
    has_zeros: bool = False
    wide_scales: bool = False
    own_tables: bool = False


def key_of(weight: TiledWeight) -> Key:
    """The key of `weight`."""
    layout = weight.layout
    sizes = layout.rows, layout.columns, layout.bits, layout.kind, layout.group
    return Key(*sizes, layout.has_zeros, weight.wide_scales, not weight.one_table)


# Numbers of tokens that were tried, ascending, and the fastest launch for each.
Launches = tuple[tuple[int, Choice], ...]
