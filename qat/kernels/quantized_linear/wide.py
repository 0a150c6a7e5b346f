"""y = x @ dequantize(W)^T for more tokens than `skinny.py` takes, and W as a matrix.

A weight in tile order is what a tensor core takes from registers, for wgmma as for mma: four warps hold 64 rows. So a
tile is decoded where it is loaded to, and multiplied from there; only x goes through shared memory. The order of k is
that of the instruction (`tiles.py`), and x is put into it once, which is a copy of x and not of the weight.

Here scales multiply values, and what is multiplied is rounded to the type of x: the same numbers as `dequantize` makes.
With more tokens it costs less than scaling sums, for which each group would have to wait for its own.

Where a grid has too few programs, columns are split, and a second kernel adds the parts in their order.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, RUF005, SIM108
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

_INTS = tl.constexpr(tuple((tl.int32,) * count for count in range(9)))


@triton.jit
def _pair_halves(pairs, like):
    """Pairs in words as two tensors, from the low halves and from the high ones."""
    low = (pairs & 0xFFFF).to(tl.int16).to(like, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(like, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _plain(codes, values, row, CENTER: tl.constexpr, ENTRIES: tl.constexpr, ONE_TABLE: tl.constexpr):
    """What codes stand for, without assembly: for the interpreter."""
    if ENTRIES == 0:
        found = (codes - CENTER).to(values.dtype.element_ty)
    else:
        found = tl.load(values + (codes if ONE_TABLE else row * ENTRIES + codes))
    return found


@triton.jit
def _pairs(
    low,
    high,
    tables,
    values,
    row,
    second,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CENTER: tl.constexpr,
    ENTRIES: tl.constexpr,
    ONE_TABLE: tl.constexpr,
):
    """Values of the codes in words: for each register of an instruction a tensor `[..., 2]`."""
    count: tl.constexpr = 2 if BITS == 8 else 4 if BITS == 4 else 8
    like: tl.constexpr = values.dtype.element_ty
    found = ()
    if TEXT != "":
        operands = (low,)
        if BITS == 3:
            operands = (low, high >> second)
        words = tl.inline_asm_elementwise(
            TEXT, CONSTRAINTS, operands + tables, dtype=_INTS[count], is_pure=True, pack=1
        )
        for i in tl.static_range(count):
            found = found + (_pair_halves(words[i], like),)
    else:
        for i in tl.static_range(count):
            first = _code(low, high, second, i, 0, BITS, ENTRIES != 0)
            other = _code(low, high, second, i, 1, BITS, ENTRIES != 0)
            first = _plain(first, values, row + i % 2 * 8, CENTER, ENTRIES, ONE_TABLE)
            other = _plain(other, values, row + i % 2 * 8, CENTER, ENTRIES, ONE_TABLE)
            found = found + (tl.join(first, other),)
    return found


@triton.jit
def _code(low, high, second, i: tl.constexpr, w: tl.constexpr, BITS: tl.constexpr, TABLES: tl.constexpr):
    """The code of half w of pair i; see `tiles._Plane.bit`."""
    h: tl.constexpr = i % 2
    e: tl.constexpr = i % 4 // 2 * 2 + w
    s: tl.constexpr = i // 4
    width: tl.constexpr = 2 if BITS == 3 else BITS
    place: tl.constexpr = 16 * h + 4 * e + 2 * s if TABLES else width * i + 16 * w
    code = (low >> place) & (2**width - 1)
    if BITS == 3:
        top: tl.constexpr = 4 * (4 * h + e) + 2 - 2 * s if TABLES else (2 * i + 2) % 16 + 16 * w
        code = code | ((high >> (top + second)) & 1) << 2
    return code


@triton.jit
def tile_values(
    codes,
    tables,
    values,
    tile,
    k,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CENTER: tl.constexpr,
    ENTRIES: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Values without their scales of rows of tiles `tile` `[ROWS / 16]`, tile k: `[ROWS, 64]` in its order of k.

    Words are loaded as `[tiles, words of 32 lanes]`, so that the compiler gives a lane those that are its own, and the
    lanes of a warp a tile: then nothing has to move before the tensor core takes it.
    """
    tiles: tl.constexpr = ROWS // 16
    each: tl.constexpr = 2 if BITS <= 3 else 4
    word = tl.arange(0, 32 * each)[None, :]
    own = word // each * 4 + word % each  # of the lane's four words of a chunk, the first `each`
    row = tile[:, None] * 16 + word // (4 * each)
    base = codes + (tile * (CHUNKS * 128))[:, None]
    if BITS == 8:  # words: q mod 2, v; a chunk for each q div 2
        low, high = tl.load(base + 2 * k * 128 + own), tl.load(base + 2 * k * 128 + 128 + own)
        a = _pairs(low, low, tables, values, row, 0, TEXT, CONSTRAINTS, BITS, CENTER, ENTRIES, ONE_TABLE)
        b = _pairs(high, high, tables, values, row, 0, TEXT, CONSTRAINTS, BITS, CENTER, ENTRIES, ONE_TABLE)
        both = tl.join(tl.join(a[0], b[0]), tl.join(a[1], b[1]))
        both = tl.reshape(both, [tiles, 8, 4, 2, 2, 2, 2, 2])  # tile g t, q mod 2, v w, q div 2, h
        w = tl.permute(both, (0, 7, 1, 6, 3, 4, 2, 5))
    elif BITS == 4:  # words: q
        low = tl.load(base + k * 128 + own)
        a = _pairs(low, low, tables, values, row, 0, TEXT, CONSTRAINTS, BITS, CENTER, ENTRIES, ONE_TABLE)
        both = tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3]))
        both = tl.reshape(both, [tiles, 8, 4, 4, 2, 2, 2])  # tile g t q w v h
        w = tl.permute(both, (0, 6, 1, 3, 5, 2, 4))
    else:  # words: q div 2
        unit = k // 2 if BITS == 2 else k // 4 * 3 + k % 4 // 2
        low = tl.load(base + unit * 128 + k % 2 * 2 + own)
        high = low
        if BITS == 3:
            high = tl.load(base + (k // 4 * 3 + 2) * 128 + k % 4 + word // each * 4)
        a = _pairs(low, high, tables, values, row, word % each, TEXT, CONSTRAINTS, BITS, CENTER, ENTRIES, ONE_TABLE)
        first = tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3]))
        second = tl.join(tl.join(a[4], a[6]), tl.join(a[5], a[7]))
        both = tl.reshape(tl.join(first, second), [tiles, 8, 4, 2, 2, 2, 2, 2])  # tile g t, q div 2, w v h, q mod 2
        w = tl.permute(both, (0, 6, 1, 3, 7, 5, 2, 4))
    return tl.reshape(w, [ROWS, 64])


@triton.jit
def _of_group(words, row, step, group, STEPS: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr):
    """The bits of a scale or a zero point of rows: 16 of them, or 32 where WIDE."""
    at = words + (row // 16 * (STEPS * 8) + step * 8 + row % 8) * WORDS
    half = row % 16 // 8
    if WIDE:
        bits = tl.load(at + 2 * group + half)
    else:
        bits = tl.load(at + group) >> (half * 16)
    return bits


@triton.jit
def _of_groups(
    w,
    scale,
    zero,
    row,
    k,
    group,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
):
    """(w - zero point) * scale, for rows and groups that are the dimensions of w but the last."""
    like: tl.constexpr = w.dtype
    if ZERO_WORDS:
        z = _of_group(zero, row, k // 4, group, STEPS, ZERO_WORDS, False) & 0xFFFF
        w = w - tl.expand_dims(z.to(tl.float32).to(like), -1)
    wide: tl.constexpr = SCALE_WORDS * GROUP != 256
    bits = _of_group(scale, row, k // 4, group, STEPS, SCALE_WORDS, wide)
    s = bits.to(tl.float32, bitcast=True) if wide else bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    if like == tl.float16:  # which does not hold the smallest scales
        w = (w.to(tl.float32) * tl.expand_dims(s.to(tl.float32), -1)).to(like)
    else:
        w = w * tl.expand_dims(s.to(like), -1)
    return w


@triton.jit
def scaled(
    w,
    scale,
    zero,
    row,
    k,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(w - zero point) * scale for a tile of `tile_values`; row scales are left to who stores."""
    like: tl.constexpr = w.dtype
    if GROUP == 0:
        if ZERO_WORDS:
            z = _of_group(zero, row, 0, 0, 1, 1, False) & 0xFFFF
            w = w - z.to(tl.float32).to(like)[:, None]
    elif GROUP == 32:
        group = k % 4 * 2 + tl.arange(0, 2)[None, :]
        halves = tl.reshape(w, [ROWS, 2, 32])
        halves = _of_groups(halves, scale, zero, row[:, None], k, group, STEPS, GROUP, SCALE_WORDS, ZERO_WORDS)
        w = tl.reshape(halves, [ROWS, 64])
    else:
        group = k % 4 * 64 // GROUP
        w = _of_groups(w, scale, zero, row, k, group, STEPS, GROUP, SCALE_WORDS, ZERO_WORDS)
    return w


@triton.jit
def tables_of_tiles(
    table, tile, BITS: tl.constexpr, TABLE_WORDS: tl.constexpr, USED: tl.constexpr, ONE_TABLE: tl.constexpr
):
    """Words of tables of rows g, and where rows have their own, of rows g + 8: each shaped as the words of codes."""
    each: tl.constexpr = 2 if BITS <= 3 else 4
    g = tl.arange(0, 32 * each)[None, :] // (4 * each)
    found = ()
    for row in tl.static_range(1 if ONE_TABLE else 2):
        own = g + tile[:, None] * 0 if ONE_TABLE else tile[:, None] * 16 + g + 8 * row
        for word in tl.static_range(USED):
            found = found + (tl.load(table + own * TABLE_WORDS + word),)
    return found


@triton.jit(do_not_specialize=["tokens", "tile_rows", "row_programs"])
def wide(
    x,
    codes,
    scale,
    zero,
    table,
    bias,
    values,
    y,
    tokens,
    rows,
    tile_rows,
    row_programs,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CENTER: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    TABLE_USED: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of ROWS outputs by TOKENS tokens, or its part of the columns.

    Args:
        x: `[tokens, COLUMNS]` in the tensor core's order, whole tiles.
        values: gives the type of values; without assembly also the tables.
        y: `[tokens, rows]`; with SPLITS, parts `[SPLITS, tokens, rows]` in float32.
    """
    program = tl.program_id(0)
    own_rows, other = program % row_programs, program // row_programs
    split, block = other % SPLITS, other // SPLITS
    tile = tl.minimum(own_rows * (ROWS // 16) + tl.arange(0, ROWS // 16), tile_rows - 1)
    row = tl.minimum(own_rows * ROWS + tl.arange(0, ROWS), tile_rows * 16 - 1)
    token = block * TOKENS + tl.arange(0, TOKENS)
    tables = ()
    if TEXT != "" and TABLE_USED > 0:
        tables = tables_of_tiles(table, tile, BITS, TABLE_WORDS, TABLE_USED, ONE_TABLE)
    each: tl.constexpr = (COLUMNS // 64 + SPLITS - 1) // SPLITS
    column = tl.arange(0, 64)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(split * each, tl.minimum(split * each + each, COLUMNS // 64), num_stages=STAGES):
        here = x + token[None, :] * COLUMNS + k * 64 + column[:, None]
        own_x = tl.load(here, mask=(token < tokens)[None, :], other=0.0)
        w = tile_values(
            codes, tables, values, tile, k, TEXT, CONSTRAINTS, BITS, CHUNKS, CENTER, ENTRIES, ONE_TABLE, ROWS
        )
        w = scaled(w, scale, zero, row, k, STEPS, GROUP, SCALE_WORDS, ZERO_WORDS, ROWS)
        total = tl.dot(w, own_x, total)
    row = own_rows * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    at = token[None, :] * rows + row[:, None]
    if SPLITS > 1:
        tl.store(y + split * (tokens * rows) + at, total, mask=inside)
    else:
        total = finished(total, scale, bias, row[:, None], rows, GROUP, HAS_BIAS)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finished(total, scale, bias, row, rows, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums by the scales of rows, where groups have none, and bias."""
    if GROUP == 0:
        total *= tl.load(scale + row, mask=row < rows, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["tokens"])
def sum_parts(
    parts,
    scale,
    bias,
    y,
    tokens,
    rows,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The parts of `wide`, added in their order."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < tokens * rows
    total = tl.zeros([WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * (tokens * rows) + at, mask=inside, other=0.0)
    total = finished(total, scale, bias, at % rows, rows, GROUP, HAS_BIAS)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tile_rows"])
def dequantize(
    codes,
    scale,
    zero,
    table,
    values,
    w,
    rows,
    tile_rows,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CENTER: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    TABLE_USED: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The weight `[rows, COLUMNS]`, a tile of ROWS by 64 a program: each lane stores runs of eight columns."""
    tiles: tl.constexpr = (COLUMNS + 63) // 64
    program = tl.program_id(0)
    k, own_rows = program % tiles, program // tiles
    tile = tl.minimum(own_rows * (ROWS // 16) + tl.arange(0, ROWS // 16), tile_rows - 1)
    row = tl.minimum(own_rows * ROWS + tl.arange(0, ROWS), tile_rows * 16 - 1)
    tables = ()
    if TEXT != "" and TABLE_USED > 0:
        tables = tables_of_tiles(table, tile, BITS, TABLE_WORDS, TABLE_USED, ONE_TABLE)
    own = tile_values(codes, tables, values, tile, k, TEXT, CONSTRAINTS, BITS, CHUNKS, CENTER, ENTRIES, ONE_TABLE, ROWS)
    own = scaled(own, scale, zero, row, k, STEPS, GROUP, SCALE_WORDS, ZERO_WORDS, ROWS)
    # Columns as 16 q + 8 v + 2 t + w become 32 (q div 2) + 8 t + 4 (q mod 2) + 2 v + w.
    own = tl.permute(tl.reshape(own, [ROWS, 2, 2, 2, 4, 2]), (0, 1, 4, 2, 3, 5))
    own = tl.reshape(own, [ROWS, 64])
    row = own_rows * ROWS + tl.arange(0, ROWS)
    if GROUP == 0:
        own = (own.to(tl.float32) * tl.load(scale + row, mask=row < rows, other=0.0)[:, None]).to(own.dtype)
    column = k * 64 + tl.arange(0, 64)
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(w + at, own, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :])
