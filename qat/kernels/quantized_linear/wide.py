"""y = x @ dequantize(W)^T for more tokens than `skinny.py` takes, and W as a matrix.

A weight in tile order is what a tensor core takes from registers, for wgmma as for mma: four warps hold 64 rows. So a
tile is decoded where it is loaded to, and multiplied from there; only x goes through shared memory. The order of k is
that of the instruction (`tiles.py`), and x is put into it once, which is a copy of x and not of the weight.

A program goes through its columns by steps of 256 or by halves of them: so what a lane loads at a time is 16 bytes,
scales included, and barriers and addresses are paid once for two or four tiles. They are one product, which Triton 3.6
takes apart into instructions of 16 columns that do not wait for each other: a tensor core multiplies while the next
columns are decoded, those of the next step too. Several products of 64 columns would each wait for the one before.

What reaches a multiprocessor from the second-level cache decides as much as decoding: for 64 tokens x is 128 bytes a
column and 64 rows of 4 bits are 32. So tiles are tall, and rows of x need no masks, because x is copied anyway.

Where a grid has too few programs, columns are split, and a second kernel adds the parts in their order.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# ruff: noqa: N803, RUF005
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,misc"

import triton
import triton.language as tl

from qat.kernels.quantized_linear.skinny import quadruples
from qat.kernels.quantized_linear.tile import PICK, SELECT_FIRST, SELECT_SECOND

_FIRST, _SECOND = tl.constexpr(SELECT_FIRST), tl.constexpr(SELECT_SECOND)
_PICK_TEXT, _PICK_CONSTRAINTS = tl.constexpr(PICK.text), tl.constexpr(PICK.constraints)
_ONE, _FOUR = tl.constexpr((tl.int32,)), tl.constexpr((tl.int32,) * 4)
# Blocks of tokens whose programs follow each other, so that those that run at the same time share x and weights: a
# block of x is some eight times as long as the codes of a block of rows, so few of x and many of the weight.
_TOGETHER = tl.constexpr(4)


@triton.jit
def tables_of_tiles(table, tile, word, TABLE_WORDS: tl.constexpr, ONE_TABLE: tl.constexpr):
    """As `skinny.tables_of_row`, for several rows of tiles: `[tiles, 128]` each."""
    g = word // 16
    if ONE_TABLE:
        found = quadruples(table + g * TABLE_WORDS + tile * 0, word, True, TABLE_WORDS, False)
    else:
        own = table + (tile * 16 + g) * TABLE_WORDS
        found = quadruples(own, word, True, TABLE_WORDS, False)
        found = found + quadruples(own + 8 * TABLE_WORDS, word, True, TABLE_WORDS, False)
    return found


@triton.jit
def codes_of_tiles(codes, tile, word, part, DEPTH: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr):
    """The chunks of DEPTH tiles, `[tiles, 128]` each; the last instead of those behind it, which meet zeros of x."""
    found = ()
    row = codes + tile * (CHUNKS * 128) + word
    if BITS == 3:  # two of low bits, which may be two tiles more than are wanted, and one of high bits
        step = part * DEPTH // 4
        for i in tl.static_range(DEPTH // 2):
            found = found + (tl.load(row + (step * 3 + part * DEPTH % 4 // 2 + i) * 128),)
        found = found + (tl.load(row + (step * 3 + 2) * 128),)
    else:
        for i in tl.static_range(DEPTH * BITS // 4):
            chunk = part * (DEPTH * BITS // 4) + i
            if CHUNKS % (DEPTH * BITS // 4) != 0:
                chunk = tl.minimum(chunk, CHUNKS - 1)
            found = found + (tl.load(row + chunk * 128),)
    return found


@triton.jit
def params_of_step(
    scale, zero, tile, word, step, STEPS: tl.constexpr, SCALE_WORDS: tl.constexpr, ZERO_WORDS: tl.constexpr
):
    """Scales and zero points of a step, where groups have them: `[tiles, 128]` each."""
    found = ()
    lane = tile * (STEPS * 8) + step * 8 + word // 16
    if SCALE_WORDS:
        found = found + quadruples(scale + lane * SCALE_WORDS, word, True, SCALE_WORDS, False)
    if ZERO_WORDS:
        found = found + quadruples(zero + lane * ZERO_WORDS, word, True, ZERO_WORDS, False)
    return found


@triton.jit
def zeros_of_rows(zero, tile, word):
    """The zero points of rows g and g + 8, `[tiles, 128]`: of four lanes g at a time, for the sake of 16 bytes."""
    words = tl.load(zero + tile * 8 + word // 64 * 4 + word % 4)
    g = word // 16 + tile * 0
    low, high = g % 2 * (_SECOND - _FIRST) + _FIRST, g // 2 % 2 * (_SECOND - _FIRST) + _FIRST
    words = (words, low, high)
    own = tl.inline_asm_elementwise(_PICK_TEXT, _PICK_CONSTRAINTS, words, dtype=_ONE, is_pure=True, pack=4)
    return (own[0],)


@triton.jit
def constants_of_rows(
    zero,
    table,
    tile,
    word,
    ZERO_OF_ROW: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ONE_TABLE: tl.constexpr,
):
    """What is the same for all columns: zero points of rows and tables, `[tiles, 128]` each."""
    found = ()
    if ZERO_OF_ROW:
        found = found + zeros_of_rows(zero, tile, word)
    if TABLE_WORDS:
        found = found + tables_of_tiles(table, tile, word, TABLE_WORDS, ONE_TABLE)
    return found


@triton.jit
def values_of_tile(
    chunks,
    others,
    NUMBER: tl.constexpr,
    TEXTS: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    LIKE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tile NUMBER of those whose chunks these are, `[ROWS, 64]` in its order of k: no word leaves its lane."""
    if BITS == 8:
        own = (chunks[2 * NUMBER], chunks[2 * NUMBER + 1])
    elif BITS == 4:
        own = (chunks[NUMBER],)
    elif BITS == 3:
        own = (chunks[NUMBER // 2], chunks[len(chunks) - 1])
    else:
        own = (chunks[NUMBER // 2],)
    a = tl.inline_asm_elementwise(TEXTS[NUMBER], CONSTRAINTS, own + others, dtype=_FOUR, is_pure=True, pack=4)
    both = tl.join(tl.join(halves(a[0], LIKE), halves(a[2], LIKE)), tl.join(halves(a[1], LIKE), halves(a[3], LIKE)))
    both = tl.reshape(both, [ROWS // 16, 8, 4, 4, 2, 2, 2])  # tile, g, t, q, w, v, h
    return tl.reshape(tl.permute(both, (0, 6, 1, 3, 5, 2, 4)), [ROWS, 64])


@triton.jit
def values_of_tiles(
    chunks,
    others,
    DEPTH: tl.constexpr,
    TEXTS: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    LIKE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All of them side by side, `[ROWS, 64 DEPTH]`."""
    w = ()
    for i in tl.static_range(DEPTH):
        w = w + (values_of_tile(chunks, others, i, TEXTS, CONSTRAINTS, BITS, LIKE, ROWS),)
    if DEPTH == 2:
        all = tl.permute(tl.join(w[0], w[1]), (0, 2, 1))
    else:
        all = tl.permute(tl.join(tl.join(w[0], w[2]), tl.join(w[1], w[3])), (0, 2, 3, 1))
    return tl.reshape(all, [ROWS, 64 * DEPTH])


@triton.jit
def halves(pairs, LIKE: tl.constexpr):
    """Pairs in words as `[..., 2]`, the low half first."""
    low = (pairs & 0xFFFF).to(tl.int16).to(LIKE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(LIKE, bitcast=True)
    return tl.join(low, high)


@triton.jit(do_not_specialize=["tokens", "tile_rows", "row_programs"])
def wide(
    x,
    codes,
    scale,
    zero,
    table,
    bias,
    y,
    tokens,
    rows,
    tile_rows,
    row_programs,
    TEXTS: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    ZERO_OF_ROW: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    SCALE_OF_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of ROWS outputs by TOKENS tokens, or its part of the columns.

    Args:
        x: `[whole tiles of tokens, 256 STEPS]` in the tensor core's order. What stands behind the last token is
            multiplied, but not stored.
        y: `[tokens, rows]`; with SPLITS, parts `[SPLITS, tokens, rows]` in float32.
    """
    own_rows, split, block = _place(tl.program_id(0), tokens, row_programs, TOKENS, SPLITS)
    tile = tl.minimum(own_rows * (ROWS // 16) + tl.arange(0, ROWS // 16), tile_rows - 1)[:, None]
    word = tl.arange(0, 128)[None, :]
    token = block * TOKENS + tl.arange(0, TOKENS)
    here = x + token[None, :] * (STEPS * 256) + tl.arange(0, 64 * DEPTH)[:, None]
    constant = constants_of_rows(zero, table, tile, word, ZERO_OF_ROW, TABLE_WORDS, ONE_TABLE)
    parts: tl.constexpr = STEPS * 4 // DEPTH
    each: tl.constexpr = (parts + SPLITS - 1) // SPLITS
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for part in tl.range(split * each, tl.minimum(split * each + each, parts), num_stages=STAGES):
        own_x = tl.load(here + part * (64 * DEPTH))
        chunks = codes_of_tiles(codes, tile, word, part, DEPTH, BITS, CHUNKS)
        others = params_of_step(scale, zero, tile, word, part * DEPTH // 4, STEPS, SCALE_WORDS, ZERO_WORDS) + constant
        if DEPTH == 2:
            others = others + (word * 0 + tile * 0 + (part % 2 * (_SECOND - _FIRST) + _FIRST),)
        w = values_of_tiles(chunks, others, DEPTH, TEXTS, CONSTRAINTS, BITS, x.dtype.element_ty, ROWS)
        total = tl.dot(w, own_x, total)
    row = own_rows * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    at = token[None, :] * rows + row[:, None]
    if SPLITS > 1:
        tl.store(y + split * (tokens * rows) + at, total, mask=inside)
    else:
        total = finished(total, scale, bias, row[:, None], rows, SCALE_OF_ROW, HAS_BIAS)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _place(program, tokens, row_programs, TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """Which rows, which part of the columns and which tokens: of _TOGETHER blocks of tokens the tokens fastest."""
    blocks = (tokens + TOKENS - 1) // TOKENS
    group = program // (_TOGETHER * SPLITS * row_programs)
    within = program % (_TOGETHER * SPLITS * row_programs)
    wide = tl.minimum(blocks - group * _TOGETHER, _TOGETHER)
    other = within // wide
    return other % row_programs, other // row_programs, group * _TOGETHER + within % wide


@triton.jit
def finished(total, scale, bias, row, rows, SCALE_OF_ROW: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums by the scales of rows, where groups have none, and bias."""
    if SCALE_OF_ROW:
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
    SCALE_OF_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The parts of `wide`, added in their order."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = at < tokens * rows
    total = tl.zeros([WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * (tokens * rows) + at, mask=inside, other=0.0)
    total = finished(total, scale, bias, at % rows, rows, SCALE_OF_ROW, HAS_BIAS)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tile_rows"])
def dequantize(
    codes,
    scale,
    zero,
    table,
    w,
    rows,
    tile_rows,
    TEXTS: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    ZERO_OF_ROW: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    SCALE_OF_ROW: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The weight `[rows, COLUMNS]`, ROWS by a step a program: each lane stores runs of eight columns, 16 bytes."""
    step, own_rows = tl.program_id(0) % STEPS, tl.program_id(0) // STEPS
    tile = tl.minimum(own_rows * (ROWS // 16) + tl.arange(0, ROWS // 16), tile_rows - 1)[:, None]
    word = tl.arange(0, 128)[None, :]
    row = own_rows * ROWS + tl.arange(0, ROWS)
    chunks = codes_of_tiles(codes, tile, word, step, 4, BITS, CHUNKS)
    others = params_of_step(scale, zero, tile, word, step, STEPS, SCALE_WORDS, ZERO_WORDS)
    others = others + constants_of_rows(zero, table, tile, word, ZERO_OF_ROW, TABLE_WORDS, ONE_TABLE)
    for i in tl.static_range(4):
        own = values_of_tile(chunks, others, i, TEXTS, CONSTRAINTS, BITS, w.dtype.element_ty, ROWS)
        # Columns as 16 q + 8 v + 2 t + w become 32 (q div 2) + 8 t + 4 (q mod 2) + 2 v + w.
        own = tl.permute(tl.reshape(own, [ROWS, 2, 2, 2, 4, 2]), (0, 1, 4, 2, 3, 5))
        own = tl.reshape(own, [ROWS, 64])
        if SCALE_OF_ROW:
            of_row = tl.load(scale + row, mask=row < rows, other=0.0)
            own = (own.to(tl.float32) * of_row[:, None]).to(own.dtype)
        column = step * 256 + i * 64 + tl.arange(0, 64)
        at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(w + at, own, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def order(x, y, stride, WORDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x `[tokens, WORDS]` in the tensor core's order, `[tokens, WIDTH]` with zeros.

    Rows of x are `stride` apart, a multiple of 4. In words of two columns: word 16 i + 4 t + 2 s + v of x is word
    16 i + 8 s + 4 v + t of y.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(x + token * tl.multiple_of(stride, 4) + at, mask=at < WORDS, other=0)
    words = tl.permute(tl.reshape(words, [BLOCK // 16, 4, 2, 2]), (0, 2, 3, 1))
    tl.store(y + token * WIDTH + at, tl.reshape(words, [BLOCK]), mask=at < WIDTH)
