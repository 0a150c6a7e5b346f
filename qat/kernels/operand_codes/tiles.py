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
def magnitude_bits(x):
    """|x| by its bits, integers in the order of the numbers that keep NaN."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def noise_at(seed, row, first, columns, WIDTH: tl.constexpr):
    """16 random bits for each element of the tile of `row` `[ROWS]` and WIDTH columns from `first` on, both in eights.

    They depend on the place and the seed alone, not on how a tensor is cut. A run of the generator serves eight, so
    that quantizing costs what reading and writing memory costs.
    (Philox 4x32-7: Parallel Random Numbers: As Easy as 1, 2, 3, Salmon et al., SC 2011.)
    """
    place = first // _EACH + tl.arange(0, WIDTH // _EACH)
    counter = row[:, None] * ((columns + _EACH - 1) // _EACH) + place[None, :]
    a, b, c, d = tl.randint4x(seed, counter, _ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (row.shape[0], WIDTH))
