"""A tile's values as PTX: 16 rows by 64 columns of a weight, by their scales, as a tensor core takes them.

Unlike in `step.py` scales multiply values here: (code - zero point) * scale, rounded to the type of x. In bfloat16
scales and entries of tables are rounded to it before, so where they are of 16 bits these are the numbers of the
dequantized matrix, and where they are of 32 bits they are one rounding further from it. Against sums by scales that is
half an instruction more for each weight, but nothing has to wait for a sum, so that the tensor core works on while the
next tile is decoded.

It is one statement of inline assembly for a tile, on tensors whose threads hold four consecutive elements each, as in
`step.py`. Triton lays tensors out as they are loaded, so all that a statement reads must be loaded by 16 bytes a lane:
one operand that is not, and the others are moved to its layout, in which four elements of a thread are no neighbours.
"""

from functools import lru_cache

from qat.kernels.quantized_linear.decode import Real
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.step import (
    Assembly,
    Lookup,
    Operands,
    table_operands,
    word_operands,
    words_of_scales,
    words_of_zeros,
)

# Selectors of prmt: the first of two words, or the second.
SELECT_FIRST, SELECT_SECOND = 0x3210, 0x7654

# One of the four words of a tensor, four times: operands are the words and selectors by the index's low and high bit.
PICK = Assembly(
    """{
.reg .b32 _low, _high;
prmt.b32 _low, $4, $5, $8;
prmt.b32 _high, $6, $7, $8;
prmt.b32 $0, _low, _high, $12;
mov.b32 $1, $0;
mov.b32 $2, $0;
mov.b32 $3, $0;
}""",
    ",".join(["=&r"] * 4 + ["r"] * 12),
)


@lru_cache
def tile(layout: Layout, real: Real, number: int, halved: bool, wide_scales: bool, one_table: bool) -> Assembly:
    """The values of tile `number` of a step, or of half a step.

    Operands are tensors of four registers a lane. Results: a0 ... a3, of which register q is that of instruction q.
    Then the chunks that hold the tile, of 8 bits two, of 3 bits one with low and one with high bits, else one; the
    scales and zero points of the step and the tables, as `step` takes them; and, where `halved`, what selects a half.

    Args:
        number: 0 ... 3, where `halved` 0 or 1 in either half.
        halved: whether which half of the step it is is known only when it runs: then `SELECT_FIRST` selects the first
            half's words of what belongs to the step, `SELECT_SECOND` those of the second.
        wide_scales: whether scales are float32, a word each, else two bfloat16 a word.
        one_table: whether all rows have the same table; else there is one for row g and then one for row g + 8.
    """
    operands = Operands()
    results = [operands.four("=&r") for _ in range(4)]
    chunks = [operands.four() for _ in range(chunks_of_tile(layout.bits))]
    scales = word_operands(operands, words_of_scales(layout, wide_scales))[: words_of_scales(layout, wide_scales)]
    zeros = word_operands(operands, words_of_zeros(layout))[: words_of_zeros(layout)]
    tables = [table_operands(layout, operands) for _ in range(1 if one_table else 2)] if layout.tables else []
    lines = ["{", ".reg .b32 a0, a1, a2, a3, a4, a5, a6, a7, s0, s1, scale_g, scale_h;"]
    if halved:
        half = _Half(operands.four()[0])
        if layout.bits == 3:
            chunks[1] = half.words("high", chunks[1])
        scales = half.words("scale", scales)
        zeros = half.words("zero", zeros) if layout.group else zeros
        lines += half.lines
    lookup = Lookup(layout, real, zeros, tables * (2 // max(1, len(tables))))
    lines += lookup.constants()
    scaling = _Scaling(layout, real, scales, wide_scales)
    first = 4 * number
    for q in range(first, first + 4):
        lines += lookup.fragments(q, _words(chunks, number, layout.bits), begins=q == first)
        lines += scaling.group(q, q == first)
        for i, value in enumerate(lookup.outs(q)):
            lines += scaling.multiply(results[i][q % 4], value, "scale_h" if i % 2 else "scale_g")
    return Assembly("\n".join([*lines, "}"]), ",".join(operands.constraints))


def chunks_of_tile(bits: int) -> int:
    """Chunks that a tile's codes are found in."""
    return 2 if bits in (3, 8) else 1


def _words(chunks: list[list[str]], number: int, bits: int) -> list[str]:
    """What a lane has of the tile, as `step` orders it: of 2 and 3 bits two tiles share a chunk, of high bits four."""
    if bits == 4:
        return chunks[0]
    if bits == 8:
        return chunks[0] + chunks[1]
    low = chunks[0][2 * (number % 2) : 2 * (number % 2) + 2]
    return [*low, chunks[1][number]] if bits == 3 else low


class _Half:
    """Picks the words of a half of a step from those of the step: a prmt each, and no predicate."""

    def __init__(self, selector: str) -> None:
        self._selector, self.lines = selector, list[str]()

    def words(self, name: str, words: list[str]) -> list[str]:
        """Registers with the first or the second half of `words`."""
        count = len(words) // 2
        names = [f"{name}_of_half{i}" for i in range(count)]
        for i, own in enumerate(names):
            self.lines += [f".reg .b32 {own};", f"prmt.b32 {own}, {words[i]}, {words[count + i]}, {self._selector};"]
        return names


class _Scaling:
    """Multiplies pairs of values by the scales of rows g and g + 8.

    bfloat16: by scales of bfloat16, one instruction for two values. float16 does not hold the smallest scales, so there
    a product is found in float32, and rounded: seven.
    """

    def __init__(self, layout: Layout, real: Real, scales: list[str], wide: bool) -> None:
        self._group, self._real, self._scales, self._wide = layout.group, real, scales, wide

    def group(self, q: int, begins: bool) -> list[str]:
        """Scales of the group of instruction q, where it is the first of a group or of a tile."""
        if not self._group or (16 * q % self._group and not begins):
            return []
        at = 16 * q // self._group
        if not self._wide:
            word = self._scales[at]
            if self._real.name == "bf16":
                return [f"prmt.b32 scale_g, {word}, 0, 0x1010;", f"prmt.b32 scale_h, {word}, 0, 0x3232;"]
            return [f"shl.b32 scale_g, {word}, 16;", f"and.b32 scale_h, {word}, 0xFFFF0000;"]
        lines = []
        for name, word in zip(("scale_g", "scale_h"), self._scales[2 * at : 2 * at + 2], strict=True):
            rounded = f"cvt.rn.bf16x2.f32 {name}, {word}, {word};"
            lines.append(rounded if self._real.name == "bf16" else f"mov.b32 {name}, {word};")
        return lines

    def multiply(self, out: str, value: str, scale: str) -> list[str]:
        if not self._group:
            return [f"mov.b32 {out}, {value};"]
        if self._real.name == "bf16":
            return [f"mul.rn.bf16x2 {out}, {value}, {scale};"]
        return [
            *("{", ".reg .b16 _l, _h;", ".reg .f32 _x, _y, _s;", f"mov.b32 {{_l, _h}}, {value};"),
            *("cvt.f32.f16 _x, _l;", "cvt.f32.f16 _y, _h;", f"mov.b32 _s, {scale};"),
            *("mul.rn.f32 _x, _x, _s;", "mul.rn.f32 _y, _y, _s;", f"cvt.rn.f16x2.f32 {out}, _y, _x;", "}"),
        ]
