"""The inner loop of a warp as PTX: 16 rows by 256 columns of a weight are decoded and multiplied by a few tokens.

It is one statement of inline assembly on tensors whose threads hold four consecutive elements each, so that a tensor is
a register quadruple of every lane. All that a lane has of a tile is in its own registers in the order in which the
tensor core takes it (`tiles.py`): nothing is exchanged between lanes, and nothing goes through shared memory.

Scales are applied to sums in float32: a group begins with sums of zero, and ends as

        total += scale[row] * sum,      four fma for 32 weights and 8 tokens at groups of 64.

So values need no rounding, and a scale for a whole row needs nothing here at all.
"""

from functools import lru_cache
from typing import NamedTuple

from qat.kernels.quantized_linear import decode
from qat.kernels.quantized_linear.decode import Offsets, Real, Table
from qat.kernels.quantized_linear.layout import GRID_TABLE, Layout
from qat.kernels.quantized_linear.tiles import CHUNK, STEP_COLUMNS, TILE_COLUMNS

TILES = STEP_COLUMNS // TILE_COLUMNS


class Assembly(NamedTuple):
    """Text of inline assembly and the constraints of its operands."""

    text: str
    constraints: str


class Operands:
    """Numbers operands in the order in which they are asked for."""

    def __init__(self) -> None:
        self.constraints: list[str] = []

    def four(self, constraint: str = "r") -> list[str]:
        """The registers that a lane has of a tensor."""
        first = len(self.constraints)
        self.constraints += [constraint] * 4
        return [f"${first + i}" for i in range(4)]


@lru_cache
def step(
    layout: Layout, real: Real, token_tiles: int, wide_scales: bool, one_table: bool, ring: bool = False
) -> Assembly:
    """The totals after a step of a warp.

    Operands are tensors of four registers a lane, in this order. Results: the totals, one for each tile of 8 tokens;
    the totals before, as many; `bits` chunks of codes; x, two for each of four tiles of 64 columns and each tile of
    tokens; scales, zero points and tables, where the layout has them.

    Args:
        token_tiles: tiles of 8 tokens, the columns of the tensor core's result.
        wide_scales: whether scales are float32, a word each, else two bfloat16 a word.
        one_table: whether all rows have the same table; else there is one for row g and then one for row g + 8.
        ring: whether codes, scales and zero points are no operands but in shared memory; in their place is one tensor
            with the address of the lane's 16 bytes of the first chunk. Others follow it, 512 bytes apart.
    """
    operands = Operands()
    totals = [operands.four("=&f") for _ in range(token_tiles)]
    before = [operands.four("f") for _ in range(token_tiles)]
    lines = ["{", ".reg .f32 none, scale_g, scale_h;", "mov.f32 none, 0f00000000;"]
    lines += [".reg .b32 a0, a1, a2, a3, a4, a5, a6, a7, s0, s1;"]
    scale_words, zero_words = words_of_scales(layout, wide_scales), words_of_zeros(layout)
    address = operands.four()[0] if ring else ""
    chunks = [] if ring else [operands.four() for _ in range(layout.bits)]
    x = [[operands.four() + operands.four() for _ in range(token_tiles)] for _ in range(TILES)]
    if ring:
        names, loads = _from_ring(
            address, layout.bits + -(-scale_words // 4) + -(-zero_words // 4) * bool(layout.group)
        )
        lines += loads
        chunks, rest = names[: layout.bits], names[layout.bits :]
        scales = [name for four in rest[: -(-scale_words // 4)] for name in four]
        zeros = [name for four in rest[-(-scale_words // 4) :] for name in four]
        if zero_words and not layout.group:
            zeros = operands.four()
    else:
        scales, zeros = word_operands(operands, scale_words), word_operands(operands, zero_words)
    tables = [table_operands(layout, operands) for _ in range(1 if one_table else 2)] if layout.tables else []
    for total, old in zip(totals, before, strict=True):
        lines += [f"mov.f32 {to}, {of};" for to, of in zip(total, old, strict=True)]
    sums = totals if not layout.group else [[f"p{n}_{i}" for i in range(4)] for n in range(token_tiles)]
    if layout.group:
        lines.append(f".reg .f32 {', '.join(name for four in sums for name in four)};")
    lookup = Lookup(layout, real, zeros, tables * (2 // max(1, len(tables))))
    lines += lookup.constants()
    every = (layout.group or STEP_COLUMNS * STEP_COLUMNS) // 16
    for q in range(4 * TILES):
        lines += lookup.fragments(q, _words(chunks, q // 4, layout.bits))
        a = ", ".join(lookup.outs(q))
        for n, four in enumerate(sums):
            fresh = layout.group and q % every == 0
            c = ["none"] * 4 if fresh else four
            b = x[q // 4][n][2 * (q % 4) : 2 * (q % 4) + 2]
            lines.append(f"{real.mma} {{{', '.join(four)}}}, {{{a}}}, {{{', '.join(b)}}}, {{{', '.join(c)}}};")
        if layout.group and (q + 1) % every == 0:
            lines += _scale(scales, q // every, wide_scales)
            lines += [
                f"fma.rn.f32 {total[i]}, {part[i]}, scale_{'g' if i < 2 else 'h'}, {total[i]};"
                for total, part in zip(totals, sums, strict=True)
                for i in range(4)
            ]
    return Assembly("\n".join([*lines, "}"]), ",".join(operands.constraints))


def words_of_scales(layout: Layout, wide_scales: bool) -> int:
    """Words of scales that a lane needs for a step."""
    return STEP_COLUMNS // layout.group * (2 if wide_scales else 1) if layout.group else 0


def words_of_zeros(layout: Layout) -> int:
    """Words of zero points that a lane needs for a step, or for a row that has one."""
    return (STEP_COLUMNS // layout.group if layout.group else 1) if layout.has_zeros else 0


def word_operands(operands: Operands, words: int) -> list[str]:
    """Registers of `words` words; fewer than four are repeated by who loads them."""
    return [name for _ in range(-(-words // 4)) for name in operands.four()]


def _from_ring(address: str, count: int) -> tuple[list[list[str]], list[str]]:
    quadruples = [[f"w{chunk}_{i}" for i in range(4)] for chunk in range(count)]
    lines = []
    for chunk, names in enumerate(quadruples):
        lines.append(f".reg .b32 {', '.join(names)};")
        lines.append(f"ld.shared.v4.b32 {{{', '.join(names)}}}, [{address}+{chunk * 4 * CHUNK}];")
    return quadruples, lines


def table_operands(layout: Layout, operands: Operands) -> Table:
    """Registers of a table, without those that fill it up."""
    names, each = word_operands(operands, layout.table_words), 2**layout.bits // 4
    return Table(names[:each], () if layout.kind == GRID_TABLE else names[each : 2 * each])


def _words(chunks: list[list[str]], tile: int, bits: int) -> list[str]:
    """What a lane has of `tile` of the step: a word for each q, two, or one for each two; last the one of high bits."""
    if bits == 4:
        return chunks[tile]
    if bits == 8:
        return chunks[2 * tile] + chunks[2 * tile + 1]
    low = chunks[tile // 2][2 * (tile % 2) : 2 * (tile % 2) + 2]
    return [*low, chunks[2][tile]] if bits == 3 else low


def _scale(words: list[str], group: int, wide: bool) -> list[str]:
    """The scales of rows g and g + 8 in float32: a bfloat16 is the upper half of one."""
    if wide:
        return [f"mov.b32 scale_g, {words[2 * group]};", f"mov.b32 scale_h, {words[2 * group + 1]};"]
    word = words[group]
    return [
        *(f"shl.b32 s0, {word}, 16;", "mov.b32 scale_g, s0;"),
        *(f"and.b32 s0, {word}, 0xFFFF0000;", "mov.b32 scale_h, s0;"),
    ]


class Lookup:
    """Decodes the fragments of one instruction after another.

    Args:
        zeros: a register for each group of the step, or one.
        tables: of rows g and g + 8.
    """

    def __init__(self, layout: Layout, real: Real, zeros: list[str], tables: list[Table]) -> None:
        self._layout, self._real, self._zeros, self._tables = layout, real, zeros, tables
        self._offsets: Offsets = {}

    def constants(self) -> list[str]:
        """What is the same for the whole step."""
        layout = self._layout
        if layout.tables:
            return []
        if layout.center is not None:
            lines, self._offsets = decode.fixed_offsets(layout.center, layout.bits, self._real, "offset")
            return lines
        return self._read_zeros(0) if not layout.group else []

    def outs(self, q: int) -> list[str]:
        """The registers that hold instruction q's fragments: with 2 and 3 bits, two are decoded at a time."""
        first = 4 * (q % 2) if self._layout.bits in (2, 3) else 0
        return [f"a{first + i}" for i in range(4)]

    def fragments(self, q: int, words: list[str], begins: bool = False) -> list[str]:
        """Decode what instruction q needs and has not yet, from the words of its tile.

        `begins`: whether nothing before q was decoded, so that q's group may have begun earlier.
        """
        bits, size, lines = self._layout.bits, self._layout.group, []
        if self._layout.has_zeros and size and (begins or 16 * q % size == 0):
            lines += self._read_zeros(16 * q // size)
        if bits in (4, 8):
            own = [[words[q % 4]]] if bits == 4 else [[word] for word in words[2 * (q % 4) : 2 * (q % 4) + 2]]
        else:
            if q % 2:
                return lines
            own = [[words[q % 4 // 2], *words[2:]]]
        outs = [f"a{i}" for i in range(8 if bits in (2, 3) else 4)]
        each = len(outs) // len(own)
        for i, group in enumerate(own):
            lines += self._decode(group, q % 4 // 2, outs[i * each : (i + 1) * each])
        return lines

    def _read_zeros(self, group: int) -> list[str]:
        name = f"zero{group}_"
        lines, self._offsets = decode.zero_offsets(self._zeros[group], self._layout.bits, self._real, name)
        return lines

    def _decode(self, words: list[str], second: int, outs: list[str]) -> list[str]:
        layout, real = self._layout, self._real
        if not layout.tables:
            return decode.integers(words, second, layout.bits, real, self._offsets, outs)
        selectors = ["s0", "s1"][: len(outs) // 4]
        lines = decode.selectors(words, second, layout.bits, selectors)
        look_up = decode.grid_table if layout.kind == GRID_TABLE else decode.table
        for i, selector in enumerate(selectors):
            lines += look_up(selector, 2**layout.bits, self._tables, real, outs[4 * i : 4 * i + 4])
        return lines
