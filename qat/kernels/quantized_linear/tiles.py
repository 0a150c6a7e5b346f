"""Tile order: how the kernels of packed linear layers store codes, scales and zero points.

A tile is 16 rows (outputs) by 64 columns k (inputs) of a weight. One warp multiplies it by four tensor-core
instructions `mma.m16n8k16` with the weight as their left operand A, so that a few tokens cost one narrow right
operand. Of A, lane = 4 g + t (g = 0 ... 7, t = 0 ... 3) holds four registers of two 16-bit values each (PTX ISA,
"Matrix Fragments for mma.m16n8k16"):

                  k = 2t, 2t+1     k = 2t+8, 2t+9
        row g          a0                a2
        row g + 8      a1                a3

and of the right operand, x, the registers b0 (k = 2t, 2t+1) and b1 (k = 2t+8, 2t+9) of token g. What the instruction
calls k is only the order of a sum, so each tile has its own: instruction q = 0 ... 3 gives lane t the columns

        k = 32 (q div 2) + 8 t + 4 (q mod 2) + e,     e = 0, 1 in a0, a1, b0;  e = 2, 3 in a2, a3, b1

of the tile. Then the 16 values of x that a lane needs for a tile are two runs of eight consecutive ones (16 bytes):

        k        0 ....... 7   8 ...... 15  16 ...... 23  24 ...... 31   32 ..... 39   ...
        lane t   0             1            2             3              0
        q        0000 1111     0000 1111    0000 1111     0000 1111      2222 3333

so x is read as it lies in memory, and a warp reads whole sectors.

The codes that a lane needs are stored side by side in words of 32 bits, and the words of the 32 lanes as chunks of 512
bytes, 16 a lane, in the order of lanes: one load of 16 bytes a lane. A row of tiles is a sequence of chunks along k:

        bits   words that a lane has of a tile             a chunk holds                    chunks of 256 columns
        4      4: one for each q                           a tile                           4
        8      8: two for each q (a0 a1, a2 a3)            half a tile (q = 0, 1 or 2, 3)   8
        2      2: one for each two q                       two tiles                        2
        3      2 of the low two bits, as with 2 bits;      two tiles of low bits; after
               1 of the high bit                           two of these four of high bits   3

In a word, codes stand as decoding wants them (`decode.py`). For integers, two halves of a word become a register by one
mask: e = 0, 2 in the low half, e = 1, 3 in the high half, each half from its low end

        a0 a1 a2 a3   of the first q, then of the second.

For tables, a half belongs to a row (g low, g + 8 high), because half a word is what selects from a table, and codes of
a half are nibbles, e = 0 ... 3, which two q of 2 bits share.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.errors import InputError
from qat.kernels.quantized_linear.decode import HIGH_BIT

TILE_ROWS, TILE_COLUMNS = 16, 64
# Words of a chunk, and columns of what a warp takes at a time: as many chunks as a code has bits.
CHUNK, STEP_COLUMNS = 128, 256
# Columns that whole chunks hold.
_UNIT_COLUMNS = {2: 128, 3: 256, 4: 64, 8: 64}
# Elements that are converted at a time.
_BLOCK = 2**22


class _Plane(NamedTuple):
    """Bits [low, low + width) of all codes: `outer` indices choose the word, from the slowest on, `inner` ones the bit.

    Indices: r row of tiles, h and g as row = 8 h + g, u unit of columns, p and j the tile in it as 2 p + j, and the
    column in the tile as 32 q + 8 t + 4 s + 2 v + w (so the instruction is 2 q + s, and e = 2 v + w).
    """

    low: int
    width: int
    outer: str
    inner: str

    def bit(self, tables: bool, h: int, q: int, s: int, v: int, w: int) -> int:
        """The lowest bit of a code in its word."""
        if self.width == 1:
            return 4 * (4 * h + 2 * v + w) + 2 - 2 * s + q if tables else HIGH_BIT[4 * s + h + 2 * v] + q + 16 * w
        if tables:
            return 16 * h + 4 * (2 * v + w) + (2 * s if self.width == 2 else 0)
        pair = {8: h, 4: h + 2 * v, 2: h + 2 * v + 4 * s}[self.width]
        return self.width * pair + 16 * w


_TWO_BITS, _HIGH_BITS = _Plane(0, 2, "rupgtjq", "hsvw"), _Plane(2, 1, "rugtpj", "hqsvw")
_PLANES = {
    2: (_TWO_BITS,),
    3: (_TWO_BITS, _HIGH_BITS),
    4: (_Plane(0, 4, "rupjgtqs", "hvw"),),
    8: (_Plane(0, 8, "rupjqgtsv", "hw"),),
}
_INDICES = "rhgupjqtsvw"


def chunks_of_row(columns: int, bits: int) -> int:
    """Chunks of a row of tiles that is `columns` wide."""
    return _units(columns, bits) * _UNIT_COLUMNS[bits] * bits // STEP_COLUMNS


def tiles_shape(rows: int, columns: int, bits: int) -> tuple[int, int]:
    """Shape `[rows of tiles, words]` of a weight `[rows, columns]` in tile order."""
    return math.ceil(rows / TILE_ROWS), chunks_of_row(columns, bits) * CHUNK


def to_tiles(codes: Tensor, bits: int, tables: bool = False, out: Tensor | None = None) -> Tensor:
    """Codes `[rows, columns]` of 0 ... 2^bits - 1 in tile order: int32 `[rows of tiles, words]`.

    What is missing for whole chunks is filled with code 0. Kernels multiply it by zeros instead of x, and do not store
    the rows.

    Args:
        codes: uint8.
        bits: 2, 3, 4 or 8.
        tables: whether the codes select from tables, else they are integers.
        out: where to write.

    Raises:
        InputError: for other bits.
    """
    _check(bits, tables)
    rows, columns = codes.shape
    shape = tiles_shape(rows, columns, bits)
    words = torch.empty(shape, dtype=torch.int32, device=codes.device) if out is None else out
    for first, last in _blocks(*shape, bits):
        block = codes[first * TILE_ROWS : last * TILE_ROWS]
        wide = _units(columns, bits) * _UNIT_COLUMNS[bits]
        padded = F.pad(block, (0, wide - columns, 0, (last - first) * TILE_ROWS - len(block)))
        words[first:last] = _words(_split(padded, bits), bits, tables)
    return words


def from_tiles(tiles: Tensor, bits: int, rows: int, columns: int, tables: bool = False) -> Tensor:
    """Undo `to_tiles`: codes uint8 `[rows, columns]`."""
    _check(bits, tables)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=tiles.device)
    for first, last in _blocks(*tiles_shape(rows, columns, bits), bits):
        wide = _units(columns, bits) * _UNIT_COLUMNS[bits]
        block = torch.zeros(((last - first) * TILE_ROWS, wide), dtype=torch.uint8, device=tiles.device)
        _read_words(tiles[first:last], _split(block, bits), bits, tables)
        own = codes[first * TILE_ROWS : last * TILE_ROWS]
        own.copy_(block[: len(own), :columns])
    return codes


def _check(bits: int, tables: bool) -> None:
    if bits not in _PLANES or (bits == 8 and tables):
        raise InputError(
            f"Kernels store 2, 3 and 4 bits a code, and integers of 8; not {bits}: see qat.numerics.packing."
        )


def _units(columns: int, bits: int) -> int:
    return math.ceil(columns / _UNIT_COLUMNS[bits])


def _blocks(tile_rows: int, words: int, bits: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of tiles, so that temporaries stay small."""
    count = max(1, _BLOCK * bits // 32 // max(words, 1))
    for first in range(0, tile_rows, count):
        yield first, min(first + count, tile_rows)


def _split(codes: Tensor, bits: int) -> Tensor:
    """`codes` `[16 r, unit u]` with a dimension for each of `_INDICES`."""
    tiles = _UNIT_COLUMNS[bits] // TILE_COLUMNS
    return codes.view(-1, 2, 8, _units(codes.shape[1], bits), max(1, tiles // 2), min(2, tiles), 2, 4, 2, 2, 2)


def _fields(codes: Tensor, plane: _Plane, tables: bool) -> Iterator[tuple[int, Tensor]]:
    """Each field of the words of `plane`: its bit, and the codes that have it, shaped as the outer indices."""
    view = codes.permute([_INDICES.index(index) for index in plane.outer + plane.inner])
    for choice in product(range(2), repeat=len(plane.inner)):
        place = {"h": 0, "q": 0, "s": 0, "v": 0, "w": 0} | dict(zip(plane.inner, choice, strict=True))
        yield plane.bit(tables, **place), view[(..., *choice)]  # type: ignore[index]


def _words(codes: Tensor, bits: int, tables: bool) -> Tensor:
    parts = []
    for plane in _PLANES[bits]:
        words = torch.zeros((), dtype=torch.int32, device=codes.device)
        for bit, field in _fields(codes, plane, tables):
            words = words | ((field >> plane.low) & (2**plane.width - 1)).to(torch.int32) << bit
        parts.append(words.reshape(codes.shape[0], codes.shape[3], -1))
    return torch.cat(parts, dim=2).flatten(1)


def _read_words(tiles: Tensor, codes: Tensor, bits: int, tables: bool) -> None:
    """Add what the words of `tiles` say to `codes`, in place."""
    planes = _PLANES[bits]
    for plane, part in zip(planes, _parts(tiles, codes, planes), strict=True):
        for bit, field in _fields(codes, plane, tables):
            values = (part.reshape(field.shape) >> bit) & (2**plane.width - 1)
            field |= values.to(torch.uint8) << plane.low


def _parts(tiles: Tensor, codes: Tensor, planes: tuple[_Plane, ...]) -> tuple[Tensor, ...]:
    """The words of each plane; widths are the shares of a unit."""
    units = tiles.view(len(tiles), codes.shape[3], -1)
    total = sum(plane.width for plane in planes)
    return units.split([units.shape[2] * plane.width // total for plane in planes], dim=2)


def to_scale_words(scale: Tensor, group: int) -> Tensor:
    """Scales `[rows, groups]` of `group` columns each as kernels load them: int32 `[rows of tiles, steps, 8, words]`.

    A lane needs the scales of rows g and g + 8 for the 256 columns of a step: `words` are 256 / group, each of two
    bfloat16 (row g low), or twice as many float32, row g first. Where bfloat16 holds all scales, it is taken. What is
    missing for whole steps is filled with zeros.
    """
    halves = scale.to(torch.bfloat16)
    if scale.dtype == torch.bfloat16 or bool((halves.to(scale.dtype) == scale).all()):
        return _pairs(halves.view(torch.int16), group)
    words = _by_lane(scale.to(torch.float32).view(torch.int32), group)
    return words.movedim(1, -1).flatten(3).contiguous()


def to_zero_words(zero_point: Tensor, group: int) -> Tensor:
    """Zero points `[rows, groups]`, whole numbers of 0 ... 255, as `to_scale_words`: two 16-bit integers a word."""
    return _pairs(zero_point.to(torch.int16), group)


def rows_of_pairs(words: Tensor) -> Tensor:
    """Undo the pairing of rows: int32 `[rows of tiles, steps, 8, words]` to int16 `[16 rows of tiles, steps words]`."""
    halves = torch.stack([words.to(torch.int16), (words >> 16).to(torch.int16)], dim=1)
    return halves.transpose(2, 3).reshape(len(words) * TILE_ROWS, -1)


def _pairs(values: Tensor, group: int) -> Tensor:
    words = _by_lane(values, group).to(torch.int32)
    return (words[:, 0] & 0xFFFF | words[:, 1] << 16).contiguous()


def _by_lane(values: Tensor, group: int) -> Tensor:
    """`[rows, groups]` as `[rows of tiles, 2, steps, 8, groups of a step]`."""
    rows, groups = values.shape
    each = STEP_COLUMNS // group
    padded = F.pad(values, (0, -groups % each, 0, -rows % TILE_ROWS))
    return padded.view(-1, 2, 8, padded.shape[1] // each, each).transpose(2, 3)
