"""How kernels go over the view `[groups, elements]`, and find the scale and the codebook of a group.

A program works on tiles of ROWS groups by WIDTH elements: many short groups at once, or a part of a long one.
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl


class Tiling(NamedTuple):
    """How `groups` of `elements` are cut.

    rows, width: of a tile, powers of two.
    blocks: of rows, each with programs of its own.
    pieces: programs that share a block of rows.
    steps: tiles of each program, side by side; a power of two, so that few kernels serve all sizes.
    """

    rows: int
    width: int
    blocks: int
    pieces: int
    steps: int


@lru_cache(maxsize=4096)
def tiling(groups: int, elements: int, tile: int, programs: int | None = None) -> Tiling:
    """Tiles of about `tile` elements; a program has one, or as many as leave at least `programs` of them."""
    width = min(power_of_two(elements), tile)
    rows = max(1, min(tile // width, power_of_two(groups)))
    blocks, across = ceil_div(groups, rows), ceil_div(elements, width)
    pieces = across if programs is None else max(1, min(across, ceil_div(programs, blocks)))
    steps = power_of_two(ceil_div(across, pieces))
    return Tiling(rows, width, blocks, ceil_div(across, steps), steps)


# Elements of a thread: with more of them it has too many registers for what hides the latency of memory. Of a group
# that is read once, because more would leave a multiprocessor room for one program only; and of a step through others.
EACH, ONCE, STEP = 16, 8192, 4096


def whole_groups(groups: int, elements: int, least: int) -> tuple[Tiling, int]:
    """Tiles of programs that go through their groups twice, to find scales and to use them; and their warps.

    A group that fits one tile is read once. Short groups share tiles of at least `least` elements.
    """
    cut = tiling(groups, elements, STEP if elements > ONCE else max(least, power_of_two(elements)), programs=1)
    return cut, max(4, cut.width // (32 * EACH))


def ceil_div(value: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-value // divisor)


def power_of_two(value: int) -> int:
    """The least power of two that is not less than `value`."""
    return 1 << (value - 1).bit_length()


@triton.jit
def own_rows(pieces, ROWS: tl.constexpr):
    """Rows of this program `[ROWS]`, and the number of its piece."""
    program = tl.program_id(0)
    return program // pieces * ROWS + tl.arange(0, ROWS), program % pieces


@triton.jit
def tile_at(row, first, groups, elements, WIDTH: tl.constexpr):
    """Where the tile from column `first` on lies in memory, and which of it is there: `[ROWS, WIDTH]`."""
    column = first + tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * elements + column[None, :]
    return at, (row < groups)[:, None] & (column < elements)[None, :]


@triton.jit
def of_rows(values, row, groups, other):
    """One value for each row, `[ROWS, 1]` float32."""
    return tl.load(values + row, mask=row < groups, other=other).to(tl.float32)[:, None]


@triton.jit
def table_of(codebook, row, groups, per_table, ENTRIES):
    """Pointers to the codebook of each row, `[ROWS, 1]`; `per_table` groups share one."""
    return (codebook + tl.minimum(row, groups - 1).to(tl.int64) // per_table * ENTRIES)[:, None]
