"""What kernels of operand codes share: how large their tiles are, and the noise that rounds at random."""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

# Of tiles of gradients, that of 4 warps: rows and columns that are read or written are whole memory sectors.
TALL, WIDE, WARPS = 32, 128, 4
# What a grid without a codebook takes in its place.
NO_TABLE: tl.constexpr = tl.constexpr(None)
# Elements that one run of the generator serves, and its rounds: the fewest that pass the statistical tests of its
# authors.
_EACH: tl.constexpr = tl.constexpr(8)
_ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def noise_at(seed, row, first, columns, WIDTH: tl.constexpr):
    """Random bits for two roundings of the tile of `row` `[ROWS]` and WIDTH columns from `first` on, both in eights.

    Each is `[ROWS, WIDTH]` int32, of which an element takes 8 bits (`noise_bits`): the four columns of a quad have the
    same word. They depend on the place and the seed alone, not on how a tensor is cut. A run of the generator serves
    eight elements, so that quantizing costs what reading and writing memory costs.
    (Philox 4x32-7: Parallel Random Numbers: As Easy as 1, 2, 3, Salmon et al., SC 2011.)
    """
    place = first // _EACH + tl.arange(0, WIDTH // _EACH)
    counter = row[:, None] * ((columns + _EACH - 1) // _EACH) + place[None, :]
    a, b, c, d = tl.randint4x(seed, counter, _ROUNDS)
    return _quads(a, b), _quads(c, d)


@triton.jit
def _quads(a, b):
    """Each word for four columns."""
    words = tl.join(a, b).to(tl.int32, bitcast=True)[:, :, :, None]
    repeated = tl.broadcast_to(words, (a.shape[0], a.shape[1], 2, 4))
    return tl.reshape(repeated, (a.shape[0], a.shape[1] * _EACH))


@triton.jit
def noise_bits(words, first, WIDTH: tl.constexpr):
    """The 8 bits of each element: bytes 0, 2, 1 and 3 of its word, as pairs of 16 bits take them."""
    column = (first + tl.arange(0, WIDTH)) & 3
    return (words >> ((column & 1) * 16 + (column >> 1) * 8)[None, :]) & 0xFF
