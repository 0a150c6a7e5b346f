"""Grids inside Triton kernels: from a scaled value to a code, and from a code to a value, in registers.

    round     consecutive integers, and an odd number of levels: the nearest one, ties to even
    floor     an even number of levels, which lie between the integers
    float     the bit patterns of small floating-point numbers
    codebook  the number of boundaries below the value; a boundary lies halfway between two ascending entries

Each does what the `Format` of `qat.numerics.formats` does, to the bit. There is no inline PTX, so that everything runs
in Triton's interpreter too.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, N806
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache

import triton
import triton.language as tl

from qat.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat, LevelFormat, VectorFormat

# Where in the tuple GRID each constant stands.
KIND: tl.constexpr = tl.constexpr(0)  # as above
LEAST: tl.constexpr = tl.constexpr(1)  # least code and greatest; of floats the greatest without its sign
MOST: tl.constexpr = tl.constexpr(2)
ZERO: tl.constexpr = tl.constexpr(3)  # round and floor: value of code 0
ENTRIES: tl.constexpr = tl.constexpr(3)  # codebook: how many, the greatest power of two below, bits after two of code
HALF: tl.constexpr = tl.constexpr(4)
BITS_LEFT: tl.constexpr = tl.constexpr(5)
MANTISSA: tl.constexpr = tl.constexpr(3)  # float: bits of the mantissa, and of the whole
BITS: tl.constexpr = tl.constexpr(4)
EXPONENT: tl.constexpr = tl.constexpr(5)  # float: that of the smallest normal number
UNBIAS: tl.constexpr = tl.constexpr(6)  # float: what makes a number of its bits in the place of a float32's

# 1.5 * 2^23, from where on float32 holds integers only: adding it rounds what is less than 2^22, ties to even.
_WHOLE: tl.constexpr = tl.constexpr(12582912.0)

Constants = tuple[str | int | float, ...]


@lru_cache
def grid_constants(format: Format) -> Constants | None:
    """The tuple GRID of `format`; None where these kernels have none: vector codebooks."""
    low, high = format.code_range
    match format:
        case VectorFormat():
            return None
        case CodebookFormat():
            return "codebook", low, high, format.entries, 1 << (format.bits - 1), max(0, format.bits - 2)
        case IntFormat():
            return "round", float(low), float(high), 0.0
        case LevelFormat():
            return "round" if format.count % 2 else "floor", float(low), float(high), -(format.count - 1) / 2
        case FloatFormat():
            sizes = format.mantissa_bits, format.bits, format.least_exponent
            return "float", low, format.highest, *sizes, 2.0 ** (126 + format.least_exponent)
    return None


@triton.jit
def encode(v, table, GRID: tl.constexpr):
    """Codes of `v` `[ROWS, WIDTH]` float32, as float32 (round, floor) or int32; `table` points to `[ROWS, 1]` rows."""
    if GRID[KIND] == "codebook":
        code, _ = _entry(v, table, GRID)
    elif GRID[KIND] == "float":
        code = _pattern(v, GRID)
    else:
        code = _cell(v, GRID)
    return code


@triton.jit
def drawn(v, noise, GRID: tl.constexpr):
    """Codes of `v` rounded at random by `noise`, as `Format.encode` does; round and float, the grids of gradients."""
    return _drawn_pattern(v, noise, GRID) if GRID[KIND] == "float" else _drawn_cell(v, noise, GRID)


@triton.jit
def nearest(v, table, GRID: tl.constexpr):
    """Values of the grid nearest to `v`: what `decode` makes of its codes."""
    if GRID[KIND] == "codebook":
        _, value = _entry(v, table, GRID)
    else:
        value = decode(encode(v, table, GRID), table, GRID)
    return value


@triton.jit
def read(stored, GRID: tl.constexpr):
    """Codes from memory, as `encode` returns them."""
    return stored.to(tl.int32 if (GRID[KIND] == "codebook") or (GRID[KIND] == "float") else tl.float32)


@triton.jit
def decode(code, table, GRID: tl.constexpr):
    """Values, float32, of what `encode` returns."""
    if GRID[KIND] == "codebook":
        value = tl.load(table + code)
    elif GRID[KIND] == "float":
        value = _number(code, GRID)
    else:
        value = code + GRID[ZERO]
    return value


@triton.jit
def whole(v):
    """The nearest integer to `v`, ties to even; |v| < 2^22."""
    return (v + _WHOLE) - _WHOLE


@triton.jit
def _cell(v, GRID: tl.constexpr):
    # Limited first, in units of values, because large numbers have no room for the rounding above.
    lowest = GRID[LEAST] + GRID[ZERO]
    highest = GRID[MOST] + GRID[ZERO]
    limited = tl.minimum(tl.maximum(v, lowest), highest)
    value = whole(limited) if GRID[KIND] == "round" else tl.floor(limited) + 0.5
    return value - GRID[ZERO]


@triton.jit
def _drawn_cell(v, noise, GRID: tl.constexpr):
    value = tl.minimum(tl.maximum(tl.floor(v + noise), GRID[LEAST] + GRID[ZERO]), GRID[MOST] + GRID[ZERO])
    return value - GRID[ZERO]


@triton.jit
def _pattern(v, GRID: tl.constexpr):
    exponent, steps = _steps(v, GRID)
    return _assembled(v, exponent, (steps + _WHOLE).to(tl.int32, bitcast=True) & 0x3FFFFF, GRID)


@triton.jit
def _drawn_pattern(v, noise, GRID: tl.constexpr):
    exponent, steps = _steps(v, GRID)
    return _assembled(v, exponent, tl.floor(steps + noise).to(tl.int32), GRID)


@triton.jit
def _steps(v, GRID: tl.constexpr):
    """The exponent of each number, and how many times the spacing of the grid there it is, without its sign."""
    magnitude = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # Below the normal numbers the spacing stays the same.
    exponent = tl.maximum((magnitude >> 23) - 127, GRID[EXPONENT])
    per_spacing = ((127 + GRID[MANTISSA] - exponent) << 23).to(tl.float32, bitcast=True)
    return exponent, magnitude.to(tl.float32, bitcast=True) * per_spacing


@triton.jit
def _assembled(v, exponent, count, GRID: tl.constexpr):
    """The bit pattern of `count` spacings at `exponent`, with the sign of `v`."""
    # A carry into the next exponent is the right code by itself.
    code = tl.minimum(count + ((exponent - GRID[EXPONENT]) << GRID[MANTISSA]), GRID[MOST])
    return tl.where(v.to(tl.int32, bitcast=True) < 0, code + (1 << (GRID[BITS] - 1)), code)


@triton.jit
def _number(code, GRID: tl.constexpr):
    sign = 1 << (GRID[BITS] - 1)
    magnitude = tl.minimum(code & (sign - 1), GRID[MOST])
    # The exponent and the mantissa lie in a float32 as they lie in the code, but for the bias.
    unbiased = (magnitude << (23 - GRID[MANTISSA])).to(tl.float32, bitcast=True)
    value = unbiased * GRID[UNBIAS]
    return tl.where(code >= sign, -value, value)


@triton.jit
def _boundary(table, K: tl.constexpr, COUNT: tl.constexpr):
    """Halfway between the entries before and at K, `[ROWS, 1]`; beyond the last, infinity."""
    last: tl.constexpr = min(K, COUNT - 1)
    middle = (tl.load(table + last - 1) + tl.load(table + last)) / 2
    return middle if K < COUNT else tl.full(middle.shape, float("inf"), tl.float32)


@triton.jit
def _entry(v, table, GRID: tl.constexpr):
    """The code of the entry nearest to `v`, and its value: a search by halving.

    Each comparison settles a bit. The boundaries of the first two are the same for a whole row; the others are read
    from where the codebook lies, one cache line for all of a warp, and the last of them has read the value.
    """
    COUNT: tl.constexpr = GRID[ENTRIES]
    HIGHEST: tl.constexpr = GRID[HALF]
    upper = v > _boundary(table, HIGHEST, COUNT)
    code = tl.where(upper, HIGHEST, 0)
    if HIGHEST == 1:
        value = tl.where(upper, tl.load(table + 1), tl.load(table))
    else:
        NEXT: tl.constexpr = HIGHEST // 2
        boundary = tl.where(upper, _boundary(table, HIGHEST + NEXT, COUNT), _boundary(table, NEXT, COUNT))
        passed = v > boundary
        code = tl.where(passed, code + NEXT, code)
        value = v
        LEFT: tl.constexpr = GRID[BITS_LEFT]
        for bit in tl.static_range(LEFT):
            step = HIGHEST >> (bit + 2)
            own = table + code
            if COUNT == 2 * HIGHEST:
                below = tl.load(own + (step - 1))
                above = tl.load(own + step)
            else:
                below = tl.load(own + (step - 1), mask=code + (step - 1) < COUNT, other=float("inf"))
                above = tl.load(own + step, mask=code + step < COUNT, other=float("inf"))
            passed = v > (below + above) / 2
            code = tl.where(passed, code + step, code)
            value = tl.where(passed, above, below)
        if HIGHEST == 2:
            value = tl.load(table + code)
    return code, value
