"""Codes of gradients, rounded at random."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from qat.kernels.fake_quantize.grid import BITS, INTERPRETED, KIND, MANTISSA, drawn
from qat.kernels.operand_codes.tiles import noise_bits

# fp8_e5m2 is the upper byte of half precision, subnormal numbers included. So four numbers become two pairs of halves,
# noise is added below their upper bytes, and those are the codes. v is within the grid, so that nothing overflows, or
# NaN, of which the scale is NaN too.
_E5M2_BY_HALVES: tl.constexpr = tl.constexpr("""{
    .reg .b32 front, back, noise;
    cvt.rn.f16x2.f32 front, $2, $1;
    cvt.rn.f16x2.f32 back, $4, $3;
    and.b32 noise, $5, 0x00FF00FF;
    add.u32 front, front, noise;
    shr.u32 noise, $5, 8;
    and.b32 noise, noise, 0x00FF00FF;
    add.u32 back, back, noise;
    prmt.b32 $0, front, back, 0x7531;
}""")


@triton.jit
def drawn_codes(v, words, first, GRID: tl.constexpr, WIDTH: tl.constexpr, QUADS: tl.constexpr):
    """Codes of `v` `[ROWS, WIDTH]` by the noise in `words`, of columns from `first` on.

    Halves round v to 11 bits before noise is added. That differs from `drawn` only where v lies exactly between two of
    them, and there by a chance of 1/256. They take a word for four neighbouring columns, which a thread holds where
    rows begin at multiples of 16 bytes (QUADS): only there does Triton give it several.
    """
    halves: tl.constexpr = (GRID[KIND] == "float") and (GRID[BITS] == 8) and (GRID[MANTISSA] == 2)
    if halves and QUADS and not INTERPRETED:
        codes = tl.inline_asm_elementwise(
            _E5M2_BY_HALVES, "=r,r,r,r,r,r,r,r,r", [v, words], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        codes = drawn(v, noise_bits(words, first, WIDTH), GRID)
    return codes
