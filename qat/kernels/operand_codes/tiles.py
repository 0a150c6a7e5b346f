"""What kernels of operand codes share: how large their tiles are, and the noise that rounds at random."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

# Of tiles that are transposed: every row that is read or written is whole memory sectors. A tile is that of 8 warps.
TALL, WIDE, WARPS = 128, 64, 8
# What a grid without a codebook takes in its place.
NO_TABLE: tl.constexpr = tl.constexpr(None)
# Numbers from one run of the generator, and its rounds: the fewest that pass the statistical tests of its authors.
_EACH: tl.constexpr = tl.constexpr(8)
_ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def noise_at(seed, row, first, columns, WIDTH: tl.constexpr):
    """Uniform numbers in (0, 1) for the tile of `row` `[ROWS]` and WIDTH columns from `first` on, multiples of 8 both.

    A number depends on its place and the seed alone, not on how a tensor is cut. 16 bits each, in the middle of their
    interval: a run of the generator serves eight, so that quantizing costs what reading and writing memory costs.
    (Philox 4x32-7: Parallel Random Numbers: As Easy as 1, 2, 3, Salmon et al., SC 2011.)
    """
    place = first // _EACH + tl.arange(0, WIDTH // _EACH)
    counter = row[:, None] * ((columns + _EACH - 1) // _EACH) + place[None, :]
    a, b, c, d = tl.randint4x(seed, counter, _ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    halves = tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (row.shape[0], WIDTH))
    # As the mantissa of a number between 1 and 2.
    return ((halves << 7) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0
