"""Codes, scales and zero points inside the kernels: how they are read, and what they stand for.

Codes are read as words of 32 bits, as they are packed: word w of a token holds the codes of PER = 32 / bits consecutive
dimensions. One instruction of decoding away is a pair (`decode.integers`): codes i and i + PER / 2 in the halves of a
register.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, N806, RUF005, SIM108
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

# Where in a tuple GRID each constant stands. Scales are shared by blocks of ROWS tokens times COLUMNS dimensions.
BITS: tl.constexpr = tl.constexpr(0)
CENTER: tl.constexpr = tl.constexpr(1)  # what is taken off a code
WORDS: tl.constexpr = tl.constexpr(2)  # of a token
WIDE: tl.constexpr = tl.constexpr(3)  # power of two, not less than WORDS
ROWS: tl.constexpr = tl.constexpr(4)
COLUMNS: tl.constexpr = tl.constexpr(5)
ACROSS: tl.constexpr = tl.constexpr(6)  # scales beside each other
HAS_ZERO: tl.constexpr = tl.constexpr(7)
TEXT: tl.constexpr = tl.constexpr(8)  # decoding a word as assembly; empty in the interpreter
CONSTRAINTS: tl.constexpr = tl.constexpr(9)

_INTS = tl.constexpr(tuple((tl.int32,) * count for count in range(9)))


@triton.jit
def pairs_of(words, like, GRID: tl.constexpr):
    """code - CENTER for the codes in words: for each pair i a tensor `[..., 2]` of the type `like`."""
    COUNT: tl.constexpr = 16 // GRID[BITS]
    found = ()
    if GRID[TEXT] != "":
        registers = tl.inline_asm_elementwise(
            GRID[TEXT], GRID[CONSTRAINTS], (words,), dtype=_INTS[COUNT], is_pure=True, pack=1
        )
        for i in tl.static_range(COUNT):
            low = (registers[i] & 0xFFFF).to(tl.int16).to(like, bitcast=True)
            high = (registers[i] >> 16).to(tl.int16).to(like, bitcast=True)
            found = found + (tl.join(low, high),)
    else:
        for i in tl.static_range(COUNT):
            low = (words >> GRID[BITS] * i) & (2 ** GRID[BITS] - 1)
            high = (words >> (GRID[BITS] * i + 16)) & (2 ** GRID[BITS] - 1)
            found = found + (tl.join((low - GRID[CENTER]).to(like), (high - GRID[CENTER]).to(like)),)
    return found


@triton.jit
def words_of(codes, token, GRID: tl.constexpr):
    """Words of tokens, `[T, WIDE]`; `token` `[T]` counts from `codes`."""
    word = tl.arange(0, GRID[WIDE])
    at = codes + token[:, None] * GRID[WORDS] + word[None, :]
    if GRID[WIDE] == GRID[WORDS]:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(word < GRID[WORDS])[None, :], other=0)
    return words


@triton.jit
def of_tokens(params, block, GRID: tl.constexpr, T: tl.constexpr):
    """A scale or zero point of each token of a block of T, `[T]` float32.

    Read by words where there are several in one: the compiler copies words to shared memory ahead of time, and nothing
    less.
    """
    SIZE: tl.constexpr = params.dtype.element_ty.primitive_bitwidth
    if (GRID[ROWS] != 1) or (SIZE == 32):
        found = tl.load(params + (block * T + tl.arange(0, T)) // GRID[ROWS])
    else:
        COUNT: tl.constexpr = T * SIZE // 32
        words = tl.load(params.to(tl.pointer_type(tl.int32), bitcast=True) + block * COUNT + tl.arange(0, COUNT))
        if SIZE == 16:
            both = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
            found = tl.reshape(both, [T]).to(params.dtype.element_ty, bitcast=True)
        else:
            even = tl.join(words & 255, (words >> 16) & 255)
            odd = tl.join((words >> 8) & 255, (words >> 24) & 255)
            found = tl.reshape(tl.join(even, odd), [T])
    return found.to(tl.float32)


@triton.jit
def of_values(params, token, dim, GRID: tl.constexpr, DIM: tl.constexpr):
    """A scale or zero point of each value, float32; `token` and `dim` broadcast to the values."""
    at = params + token // GRID[ROWS] * GRID[ACROSS] + dim // GRID[COLUMNS]
    return tl.load(at, mask=(dim < DIM) & (token >= 0), other=0).to(tl.float32)


@triton.jit
def scaled(values, scale, zero, token, dim, GRID: tl.constexpr, DIM: tl.constexpr):
    """(value - zero point) * scale in float32, rounded to the type of values, as `dequantize` does."""
    exact = values.to(tl.float32)
    if GRID[HAS_ZERO]:
        exact -= of_values(zero, token, dim, GRID, DIM)
    return (exact * of_values(scale, token, dim, GRID, DIM)).to(values.dtype)
