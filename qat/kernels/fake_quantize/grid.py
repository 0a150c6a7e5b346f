"""Grids inside Triton kernels: from a scaled value to a code, and from a code to a value, in registers.

    round     consecutive integers, and an odd number of levels: the nearest one, ties to even
    floor     an even number of levels, which lie between the integers
    float     the bit patterns of small floating-point numbers
    codebook  the number of boundaries below the value; a boundary lies halfway between two ascending entries

Each does what the `Format` of `qat.numerics.formats` does, to the bit, and everything runs in Triton's interpreter too.
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
ENTRIES: tl.constexpr = tl.constexpr(3)  # codebook: how many, and the greatest power of two below
HALF: tl.constexpr = tl.constexpr(4)
EARLY: tl.constexpr = tl.constexpr(5)  # codebook: bits of a code that boundaries in registers settle, and the others
MIDDLE: tl.constexpr = tl.constexpr(6)  # but the last
MANTISSA: tl.constexpr = tl.constexpr(3)  # float: bits of the mantissa, and of the whole
BITS: tl.constexpr = tl.constexpr(4)
EXPONENT: tl.constexpr = tl.constexpr(5)  # float: that of the smallest normal number
SHRINK: tl.constexpr = tl.constexpr(6)  # float: the factor that gives float32 the exponents of the grid
LARGEST: tl.constexpr = tl.constexpr(7)  # float: the greatest value

# 1.5 * 2^23, from where on float32 holds integers only: adding it rounds what is less than 2^22, ties to even.
_WHOLE: tl.constexpr = tl.constexpr(12582912.0)
# Triton's interpreter has no PTX, and rounds products before it adds to them.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

Constants = tuple[str | int | float, ...]


@lru_cache
def grid_constants(format: Format) -> Constants | None:
    """The tuple GRID of `format`; None where these kernels have none: vector codebooks."""
    low, high = format.code_range
    match format:
        case VectorFormat():
            return None
        case CodebookFormat():
            early = min(3, format.bits - 1)
            return "codebook", low, high, format.entries, 1 << (format.bits - 1), early, format.bits - 1 - early
        case IntFormat():
            return "round", float(low), float(high), 0.0
        case LevelFormat():
            return "round" if format.count % 2 else "floor", float(low), float(high), -(format.count - 1) / 2
        case FloatFormat():
            sizes = format.mantissa_bits, format.bits, format.least_exponent
            return "float", low, format.highest, *sizes, 2.0 ** (-126 - format.least_exponent), format.range()[1]
    return None


@triton.jit
def quotient(x, s, inverse):
    """x / s, rounded to nearest, as PyTorch divides; `s` `[ROWS, 1]` and its inverse, 1 / s rounded to nearest.

    Two corrections of x * inverse by the exact remainder, on the units that multiply, instead of a division for every
    element: Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, IBM J. Res. Dev. 34
    (1990), theorem on quotients. It holds where no remainder is lost below 2^-149, for |x| above 2^-101, and where
    quotients are less than 1e30, beyond every grid.
    """
    if INTERPRETED:
        exact = tl.div_rn(x, tl.broadcast_to(s, x.shape))
    else:
        first, negative = x * inverse, -s  # of s, because Triton subtracts from zero for it
        nearer = tl.fma(tl.fma(first, negative, x), inverse, first)
        nearest = tl.fma(tl.fma(nearer, negative, x), inverse, nearer)
        # There is no remainder of infinity, and that of -0 would be 0.
        exact = tl.where((tl.abs(first) < 1e30) & (first != 0), nearest, first)
    return exact


@triton.jit
def inverse_of(s):
    """1 / s, rounded to nearest."""
    return tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)


@triton.jit
def table_for(pointer, GRID: tl.constexpr):
    """A codebook for the functions below: where its rows lie `[ROWS, 1]`, and the boundaries that stay in registers.

    These settle the first bits of a code: boundary number i of 2^EARLY is the one before entry 2 HIGHEST / 2^EARLY * i.
    """
    STEP: tl.constexpr = 2 * GRID[HALF] >> GRID[EARLY]
    COUNT: tl.constexpr = GRID[ENTRIES]
    b4 = _boundary(pointer, GRID[HALF], COUNT)
    b1, b2, b3, b5, b6, b7 = b4, b4, b4, b4, b4, b4
    if GRID[EARLY] >= 2:
        b2, b6 = _boundary(pointer, GRID[HALF] // 2, COUNT), _boundary(pointer, GRID[HALF] // 2 * 3, COUNT)
    if GRID[EARLY] >= 3:
        b1, b3 = _boundary(pointer, STEP, COUNT), _boundary(pointer, STEP * 3, COUNT)
        b5, b7 = _boundary(pointer, STEP * 5, COUNT), _boundary(pointer, STEP * 7, COUNT)
    return pointer, b1, b2, b3, b4, b5, b6, b7


@triton.jit
def encode(v, table, GRID: tl.constexpr):
    """Codes of `v` `[ROWS, WIDTH]` float32, as float32 (round, floor) or int32; `table` as `table_for` returns it."""
    if GRID[KIND] == "codebook":
        code, _ = _entry(v, table, GRID)
    elif GRID[KIND] == "float":
        code = _pattern(v, GRID)
    else:
        code = _cell(v, GRID)
    return code


@triton.jit
def drawn(v, bits, GRID: tl.constexpr):
    """Codes of `v` rounded at random; round and float, the grids of gradients.

    As `Format.encode` does with noise = (bits + 1/2) / 256, for `bits` of 0 to 255.
    """
    return _drawn_pattern(v, bits, GRID) if GRID[KIND] == "float" else _drawn_cell(v, bits, GRID)


@triton.jit
def nearest(v, table, GRID: tl.constexpr):
    """Values of the grid nearest to `v`: what `decode` makes of its codes."""
    if GRID[KIND] == "codebook":
        _, value = _entry(v, table, GRID)
    elif GRID[KIND] == "float":
        value = _with_sign_of(v, _nearest_magnitude(v, GRID))
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
        value = tl.load(table[0] + code)
    elif GRID[KIND] == "float":
        value = _number(code, GRID)
    else:
        value = _moved(code, GRID[ZERO])
    return value


@triton.jit
def kept_nan(value, x):
    """`value`, which a grid made of `x`; NaN where that is, for which no grid has a value."""
    return tl.where(x == x, value, x)


@triton.jit
def _moved(value, BY: tl.constexpr):
    """value + BY; compilers keep the addition of zero, since it makes 0 of -0, which rounded numbers never are."""
    return value if BY == 0 else value + BY


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
    return _moved(value, -GRID[ZERO])


@triton.jit
def _drawn_cell(v, bits, GRID: tl.constexpr):
    # As the mantissa of a number between 1 and 2.
    noise = ((bits << 15) | 0x3F804000).to(tl.float32, bitcast=True) - 1.0
    value = tl.minimum(tl.maximum(tl.floor(v + noise), GRID[LEAST] + GRID[ZERO]), GRID[MOST] + GRID[ZERO])
    return _moved(value, -GRID[ZERO])


# Small floats. Multiplied by SHRINK, a float32 has the exponents of the grid, its subnormal numbers too, so that the
# leading bits of its pattern are those of the grid's.


@triton.jit
def _nearest_magnitude(v, GRID: tl.constexpr):
    """|v| rounded to the grid: adding the power of two whose last bit is the spacing there rounds, ties to even."""
    magnitude = tl.minimum(tl.abs(v), GRID[LARGEST])
    # Below the normal numbers the spacing stays the same.
    power = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, (127 + GRID[EXPONENT]) << 23)
    rounder = (power + ((23 - GRID[MANTISSA]) << 23)).to(tl.float32, bitcast=True)
    return (magnitude + rounder) - rounder


@triton.jit
def _pattern(v, GRID: tl.constexpr):
    bits = (_nearest_magnitude(v, GRID) * GRID[SHRINK]).to(tl.int32, bitcast=True)
    return (bits >> (23 - GRID[MANTISSA])) | _sign_bit(v, GRID)


@triton.jit
def _drawn_pattern(v, bits, GRID: tl.constexpr):
    BELOW: tl.constexpr = 23 - GRID[MANTISSA]  # bits that the grid has no room for
    magnitude = (tl.abs(v) * GRID[SHRINK]).to(tl.int32, bitcast=True)
    # A carry into the next exponent is the right code by itself.
    code = (magnitude + ((bits << (BELOW - 8)) | (1 << (BELOW - 9)))) >> BELOW
    return tl.minimum(code, GRID[MOST]) | _sign_bit(v, GRID)


@triton.jit
def _sign_bit(v, GRID: tl.constexpr):
    return (v.to(tl.int32, bitcast=True) >> (32 - GRID[BITS])) & (1 << (GRID[BITS] - 1))


@triton.jit
def _with_sign_of(v, magnitude):
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _number(code, GRID: tl.constexpr):
    sign = 1 << (GRID[BITS] - 1)
    magnitude = tl.minimum(code & (sign - 1), GRID[MOST])
    GROW: tl.constexpr = 1 / GRID[SHRINK]
    value = (magnitude << (23 - GRID[MANTISSA])).to(tl.float32, bitcast=True) * GROW
    return tl.where(code >= sign, -value, value)


@triton.jit
def _boundary(pointer, K: tl.constexpr, COUNT: tl.constexpr):
    """Halfway between the entries before and at K, `[ROWS, 1]`; beyond the last, infinity."""
    last: tl.constexpr = min(K, COUNT - 1)
    middle = (tl.load(pointer + last - 1) + tl.load(pointer + last)) * 0.5
    return middle if K < COUNT else tl.full(middle.shape, float("inf"), tl.float32)


@triton.jit
def _entry(v, table, GRID: tl.constexpr):
    """The code of the entry nearest to `v`, and its value: a search by halving.

    Each comparison settles a bit, the first ones by boundaries from registers, the others by entries from memory, one
    cache line for all of a warp. The last one reads the two entries that are left, one of which is the value.
    """
    pointer, b1, b2, b3, b4, b5, b6, b7 = table
    COUNT: tl.constexpr = GRID[ENTRIES]
    HIGHEST: tl.constexpr = GRID[HALF]
    EARLY_BITS: tl.constexpr = GRID[EARLY]
    code = tl.zeros(v.shape, tl.int32)
    if EARLY_BITS >= 1:
        upper = v > b4
        code = tl.where(upper, HIGHEST, 0)
    if EARLY_BITS >= 2:
        passed = v > tl.where(upper, b6, b2)
        code = tl.where(passed, code + HIGHEST // 2, code)
    if EARLY_BITS >= 3:
        passed = v > tl.where(passed, tl.where(upper, b7, b3), tl.where(upper, b5, b1))
        code = tl.where(passed, code + HIGHEST // 4, code)
    LEVELS: tl.constexpr = GRID[MIDDLE]
    for level in tl.static_range(LEVELS):
        step = HIGHEST >> (EARLY_BITS + level)
        below, above = _around(pointer + code, code, step, COUNT, HIGHEST)
        code = tl.where(v > (below + above) * 0.5, code + step, code)
    below, above = _last_two(pointer + code, code, COUNT, HIGHEST)
    passed = v > (below + above) * 0.5
    return tl.where(passed, code + 1, code), tl.where(passed, above, below)


@triton.jit
def _around(own, code, step, COUNT: tl.constexpr, HIGHEST: tl.constexpr):
    """The entries before and at `step` from `own`; infinity beyond the last."""
    if COUNT == 2 * HIGHEST:
        below, above = tl.load(own + (step - 1)), tl.load(own + step)
    else:
        below = tl.load(own + (step - 1), mask=code + (step - 1) < COUNT, other=float("inf"))
        above = tl.load(own + step, mask=code + step < COUNT, other=float("inf"))
    return below, above


@triton.jit
def _last_two(own, code, COUNT: tl.constexpr, HIGHEST: tl.constexpr):
    """The entries at `own` and after it; of full codebooks by one load."""
    if COUNT == 2 * HIGHEST:
        pair = tl.load(own.to(tl.pointer_type(tl.int64), bitcast=True))
        below = pair.to(tl.int32).to(tl.float32, bitcast=True)
        above = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        below, above = _around(own, code, 1, COUNT, HIGHEST)
    return below, above
