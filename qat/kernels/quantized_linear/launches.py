"""How a packed weight can be multiplied: the kernels, and what of their launch can be chosen."""

from typing import NamedTuple

from qat.kernels.quantized_linear.layout import Layout


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
    """What a choice depends on, of a layout."""

    rows: int
    columns: int
    bits: int
    kind: str
    group: int


def key_of(layout: Layout) -> Key:
    """The key of `layout`."""
    return Key(layout.rows, layout.columns, layout.bits, layout.kind, layout.group)


# Up to so many tokens, and how; ascending.
Launches = tuple[tuple[int, Choice], ...]
