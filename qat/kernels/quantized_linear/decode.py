"""PTX that turns codes in words into the 16-bit values that a tensor core multiplies.

At the speed of memory an H100 has about 8 / b instructions of its integer pipe (and, or, shift, lop3, prmt: 64 lanes a
clock and multiprocessor) for each two weights of b bits: 2.0 a weight at 4 bits, 1.6 at 3, 1.1 at 2, 4.0 at 8. What a
weight costs there decides whether a kernel waits for memory or memory for it, so conversions are not used. Costs
below are such instructions a weight; fma.rn.bf16x2 goes to another pipe.

Functions return lines of PTX that read registers by name and write others. Temporary registers are those of a block,
and begin with an underscore, as no name that is passed does: a block hides what outer ones call alike. `Real` says
which of the two 16-bit types the values have.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

# lop3.b32 d, a, b, c with these tables is (a & b) | c and (~a & b) | c.
_AND_OR, _NOT_AND_OR = "0xEA", "0xAE"


class Real(NamedTuple):
    """A 16-bit type whose numbers in [magic, 2 magic) have the spacing 1.

    name: in instructions.
    magic: 128 = 2^7 for the 7 bits of bfloat16's fraction, 1024 for the 10 of float16's. A whole number below it,
        written into the fraction, is added to it: so `or` converts.
    magic_bits: those of `magic`, and of -magic with the highest bit set.
    powers: bits of 2^-p, p = 0 ... 4.
    minus_one: bits of -1.
    """

    name: str
    magic: int
    magic_bits: int
    powers: tuple[int, ...]
    minus_one: int

    @property
    def mma(self) -> str:
        """The tensor core's instruction: m16n8k16 with float32 sums."""
        return f"mma.sync.aligned.m16n8k16.row.col.f32.{self.name}.{self.name}.f32"


BFLOAT16 = Real("bf16", 128, 0x4300, (0x3F80, 0x3F00, 0x3E80, 0x3E00, 0x3D80), 0xBF80)
FLOAT16 = Real("f16", 1024, 0x6400, (0x3C00, 0x3800, 0x3400, 0x3000, 0x2C00), 0xBC00)
REALS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

# Where the pairs of a word of integers are read, in the order of a0 ... a3 of its instructions: (shift of the word,
# place p of the lowest bit in the half then). Pairs whose fractions still hold them are not shifted one by one.
FIELDS = {2: ((0, 0), (0, 2), (0, 4), (6, 0), (6, 2), (6, 4), (12, 0), (12, 2)), 4: ((0, 0), (4, 0), (8, 0), (12, 0))}
FIELDS[3] = FIELDS[2]

# Where in its half the high bit of a 3-bit code stands in its own word, for the same pairs, and one further for the
# words of the second two instructions: two above the place p, after as few shifts as there can be.
HIGH_BIT = (2, 4, 6, 8, 10, 12, 14, 0)

# By place: registers with what `integers` adds, for the rows g and g + 8.
Offsets = Mapping[int, tuple[str, str]]


def twice(bits: int) -> str:
    """A 16-bit pattern in both halves of a register."""
    return f"0x{bits | bits << 16:08X}"


def places(bits: int) -> tuple[int, ...]:
    """Places p for which `integers` needs offsets."""
    return (0,) if bits in (4, 8) else (0, 2, 4)


def bits_of(value: float, real: Real) -> int:
    """The 16-bit pattern of `value`, a multiple of 1/8 that `real` holds."""
    magnitude = abs(value)
    if magnitude == 0:
        return 0
    exponent = 0
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    fraction = (magnitude - 1) * real.magic
    bias = 127 if real.name == "bf16" else 15
    assert fraction == int(fraction), f"{value} is no {real.name}"
    return (0x8000 if value < 0 else 0) | (exponent + bias) * real.magic | int(fraction)


def fixed_offsets(center: int, bits: int, real: Real, name: str) -> tuple[list[str], Offsets]:
    """Registers for values code - center, and the lines that set them.

    At place p the fraction holds code 2^p, and (magic + code 2^p) 2^-p - (magic 2^-p + center) = code - center. All are
    numbers that both types hold, so the result is exact.
    """
    lines, offsets = [], {}
    for p in places(bits):
        value = 128 - center if _splits_bytes(bits, real) else -(real.magic / 2**p + center)
        if value:
            lines.append(f".reg .b32 {name}{p};\nmov.b32 {name}{p}, {twice(bits_of(value, real))};")
            offsets[p] = (f"{name}{p}", f"{name}{p}")
    return lines, offsets


def zero_offsets(word: str, bits: int, real: Real, name: str) -> tuple[list[str], Offsets]:
    """As `fixed_offsets`, for a zero point of each row: 16-bit integers in the halves of `word`, of row g the low one.

    They become fractions of -magic by one `or`; places other than 0 are a sum further, because magic (1 - 2^-p) is
    exact. 3 to 7 instructions a group.
    """
    names = {p: (f"{name}{p}g", f"{name}{p}h") for p in places(bits)}
    lines = [f".reg .b32 {', '.join(sum(names.values(), ()))};", "{", ".reg .b32 _z, _t, _one, _k;"]
    lines.append(f"mov.b32 _one, {twice(real.powers[0])};")
    if _splits_bytes(bits, real):  # 128 - zero point: the negative of what `_bytes` finds
        lines += [
            f"lop3.b32 _z, {word}, 0x007F007F, {twice(real.magic_bits)}, {_AND_OR};",
            f"lop3.b32 _t, {word}, 0x00800080, {twice(real.magic_bits)}, {_NOT_AND_OR};",
            f"mov.b32 _k, {twice(real.minus_one)};",
            _fma("_z", "_z", "_k", "_t", real),
        ]
    else:
        lines.append(f"or.b32 _z, {word}, {twice(real.magic_bits | 0x8000)};")
    for p, (row_g, row_h) in names.items():
        source = "_z"
        if p:
            lines.append(f"mov.b32 _k, {twice(bits_of(real.magic - real.magic / 2**p, real))};")
            lines.append(_fma("_t", "_z", "_one", "_k", real))
            source = "_t"
        lines += [f"prmt.b32 {row_g}, {source}, 0, 0x1010;", f"prmt.b32 {row_h}, {source}, 0, 0x3232;"]
    return [*lines, "}"], names


def integers(
    words: Sequence[str], second: int, bits: int, real: Real, offsets: Offsets, outs: Sequence[str]
) -> list[str]:
    """code - zero point for the fields of one word, or of one of low bits with the high bits in another.

    4 bits: `(word >> 4 i) & 0x000F000F | magic` makes magic + code of two weights, and one fma takes the offset off.
    3 shifts and 4 lop3 for 8 weights: 0.9. 2 bits: the fraction has room for three codes, of which fma undoes the shift
    by 0, 2 or 4 places, so 2 shifts and 8 lop3 for 16 weights: 0.6. 3 bits: the high bit is put above the two others
    by a second lop3, 1.3. All have 0.5 fma.

    Args:
        words: one, or for 3 bits (low bits, high bits); for 8 bits one of the two of an instruction.
        second: for 3 bits, 1 for the words of the second two instructions, whose high bits are one place further.
        outs: the registers a0 ... a3 of each instruction in turn: 4 for 4 bits, 8 for 2 and 3, 2 for 8.
    """
    if bits == 8:
        return _bytes(words[0], real, offsets, outs)
    lines = ["{", ".reg .b32 _low, _high, _away, _magic, _power0, _power2, _power4;"]
    lines += [f"mov.b32 _magic, {twice(real.magic_bits)};", f"mov.b32 _low, {words[0]};"]
    lines += [f"mov.b32 _power{p}, {twice(real.powers[p])};" for p in places(bits)]
    if bits == 3:
        lines.append(_shifted("_high", words[1], second))
    before = 0
    for i, (shift, p) in enumerate(FIELDS[bits]):
        if shift != before:
            lines.append(f"shr.u32 _low, {words[0]}, {shift};")
            before = shift
        mask = (3 if bits == 3 else 2**bits - 1) << p
        lines.append(f"lop3.b32 {outs[i]}, _low, {twice(mask)}, _magic, {_AND_OR};")
        if bits == 3:
            # Pairs that are as far away follow each other.
            if i == 0 or HIGH_BIT[i] - p != HIGH_BIT[i - 1] - FIELDS[bits][i - 1][1]:
                lines.append(_shifted("_away", "_high", HIGH_BIT[i] - p - 2))
            lines.append(f"lop3.b32 {outs[i]}, _away, {twice(4 << p)}, {outs[i]}, {_AND_OR};")
        lines.append(_fma(outs[i], outs[i], f"_power{p}", offsets[p][i % 2], real))
    return [*lines, "}"]


def _shifted(out: str, source: str, places: int) -> str:
    """`source` moved to the right, or to the left by negative places."""
    if not places:
        return f"mov.b32 {out}, {source};"
    return f"{'shr.u32' if places > 0 else 'shl.b32'} {out}, {source}, {abs(places)};"


def _splits_bytes(bits: int, real: Real) -> bool:
    """Whether a code is too long for a fraction."""
    return 2**bits > real.magic


def _bytes(word: str, real: Real, offsets: Offsets, outs: Sequence[str]) -> list[str]:
    """8 bits: bytes 0 and 2 are a pair, 1 and 3 another.

    float16's fraction holds a byte: 0.75. bfloat16's holds 7 bits; the eighth, if not set, makes 256 of another 128:
    (128 + low bits) - (128 or 256) = code - 128, one lop3 more: 1.25 and 0.5 fma, and as many for other zero points.
    """
    lines = ["{", ".reg .b32 _w, _t, _one, _minus, _magic;", f"mov.b32 _magic, {twice(real.magic_bits)};"]
    lines += [f"mov.b32 _one, {twice(real.powers[0])};", f"mov.b32 _minus, {twice(real.minus_one)};"]
    lines.append(f"mov.b32 _w, {word};")
    for half, out in enumerate(outs):
        if half:
            lines.append(f"shr.u32 _w, {word}, 8;")
        if _splits_bytes(8, real):
            lines += [
                f"lop3.b32 {out}, _w, 0x007F007F, _magic, {_AND_OR};",
                f"lop3.b32 _t, _w, 0x00800080, _magic, {_NOT_AND_OR};",
                _fma(out, "_t", "_minus", out, real),
            ]
        else:
            lines.append(f"lop3.b32 {out}, _w, 0x00FF00FF, _magic, {_AND_OR};")
        if offsets:
            lines.append(_fma(out, out, "_one", offsets[0][half], real))
    return [*lines, "}"]


class Table(NamedTuple):
    """Registers that hold a table for a row: bytes of its entries, four in a register, in order.

    high: the upper bytes of the entries; none for entries on the 7-bit grid.
    """

    low: Sequence[str]
    high: Sequence[str] = ()


def selectors(words: Sequence[str], second: int, bits: int, names: Sequence[str]) -> list[str]:
    """What selects from tables, as nibbles: a register `names` for each instruction that `words` serve.

    4 bits: the word itself. 2 bits: nibbles hold the codes of two instructions. 3 bits: the high bit joins by a lop3.
    0.1 to 0.5.
    """
    if bits == 4:
        return [f"mov.b32 {names[0]}, {words[0]};"]
    lines = ["{", ".reg .b32 _t, _v;"]
    if bits == 3:
        lines.append(_shifted("_v", words[1], second))
    for turn, name in enumerate(names):
        source = words[0]
        if turn:
            lines.append(f"shr.u32 _t, {source}, 2;")
            source = "_t"
        lines.append(f"and.b32 {name}, {source}, 0x33333333;")
        if bits == 3:
            if turn:
                lines.append("shl.b32 _v, _v, 2;")
            lines.append(f"lop3.b32 {name}, _v, 0x44444444, {name}, {_AND_OR};")
    return [*lines, "}"]


def table(selector: str, entries: int, tables: Sequence[Table], real: Real, outs: Sequence[str]) -> list[str]:
    """Entries of any values for eight codes: prmt picks four bytes of eight by four nibbles.

    The low and the high bytes of the values are found apart, for the four codes of a row at a time, and interleaved. 16
    entries are two halves of eight, and the fourth bit picks between them: for four weights 2 * 3 prmt and 2 to
    interleave, 2.6 in all. 8 entries: 1.0 and what selectors cost; so 4 entries.

    Args:
        selector: nibbles, those of row g in the low half.
        tables: of row g and of row g + 8; the same one twice where rows share it.
        outs: a0 ... a3.
    """
    lines = _halves(selector, entries)
    for row, own in enumerate(tables):
        lines += _pick(own.low, row, entries, "_l") + _pick(own.high, row, entries, "_h")
        lines += [f"prmt.b32 {outs[row]}, _l, _h, 0x5140;", f"prmt.b32 {outs[row + 2]}, _l, _h, 0x7362;"]
    return [*lines, "}"]


def grid_table(selector: str, entries: int, tables: Sequence[Table], real: Real, outs: Sequence[str]) -> list[str]:
    """As `table`, for entries that are whole numbers of -64 ... 63: stored as bytes, 64 more than they are.

    The high byte is that of magic for all, so there is one look-up instead of two, and one fma for two weights: 1.9 and
    0.5 fma at 16 entries.
    """
    magic, offset = real.magic_bits >> 8, twice(bits_of(-(real.magic + 64.0), real))
    lines = [*_halves(selector, entries), ".reg .b32 _m, _o, _one;", f"mov.b32 _m, 0x{magic * 0x01010101:08X};"]
    lines += [f"mov.b32 _o, {offset};", f"mov.b32 _one, {twice(real.powers[0])};"]
    for row, own in enumerate(tables):
        lines += _pick(own.low, row, entries, "_l")
        for out, order in ((outs[row], "0x4140"), (outs[row + 2], "0x4342")):
            lines += [f"prmt.b32 {out}, _l, _m, {order};", _fma(out, out, "_one", "_o", real)]
    return [*lines, "}"]


def _halves(selector: str, entries: int) -> list[str]:
    """Selectors of the two rows: s0, s1; of 16 entries also what picks a half of the table: p0, p1."""
    lines = ["{", ".reg .b32 _s0, _s1, _p0, _p1, _l, _h, _u;"]
    if entries <= 8:
        return [*lines, f"mov.b32 _s0, {selector};", f"shr.u32 _s1, {selector}, 16;"]
    return [
        *lines,
        f"and.b32 _s0, {selector}, 0x77777777;",  # the highest bit of a nibble would ask prmt for a sign
        "shr.u32 _s1, _s0, 16;",
        # Byte i of the first half is i, of the second 4 + i: the fourth bit of the code moved to where 4 stands.
        f"shr.u32 _p0, {selector}, 1;",
        f"lop3.b32 _p0, _p0, 0x44444444, 0x32103210, {_AND_OR};",
        "shr.u32 _p1, _p0, 16;",
    ]


def _pick(table: Sequence[str], row: int, entries: int, out: str) -> list[str]:
    """Four bytes of a table of 4, 8 or 16."""
    first = f"prmt.b32 {out}, {table[0]}, {table[min(1, len(table) - 1)]}, _s{row};"
    if entries <= 8:
        return [first]
    return [first, f"prmt.b32 _u, {table[2]}, {table[3]}, _s{row};", f"prmt.b32 {out}, {out}, _u, _p{row};"]


def _fma(out: str, a: str, b: str, c: str, real: Real) -> str:
    return f"fma.rn.{real.name}x2 {out}, {a}, {b}, {c};"
