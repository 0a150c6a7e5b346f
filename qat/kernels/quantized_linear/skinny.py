"""y = x @ dequantize(W)^T for few tokens: weights stream from memory to registers, once.

A program has rows of 16 outputs, and its warps share their columns: each takes every WARPS_K-th step of 256 columns and
sums in float32, at the end the warps' sums are added in their order. So bits are the same in every run, and no other
kernel or memory is needed. What a warp does with a step is `step.py`.

Latency decides here, not arithmetic: a warp asks for the codes of its next step before it multiplies those of the last
(two sets of registers take turns, so that nothing is copied). ptxas would move the loads down to their use to save
registers; a bound of its own on registers (`maxnreg`) keeps it from that. The alternative is `ring.py`.
"""

# Triton writes compile-time constants in capitals, and gives no types to pointers.
# Tuples of tensors grow by sums, which is what its compiler knows.
# ruff: noqa: N803, RUF005, SIM108
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code=assignment

import triton
import triton.language as tl

# Results of the assembly, by the number of tiles of tokens.
SUMS = tl.constexpr(tuple((tl.float32,) * count for count in range(5)))


@triton.jit
def quadruples(pointer, e, mask, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """WORDS words from `pointer` on, four a tensor; fewer than four are repeated."""
    found = ()
    for first in tl.static_range(0, WORDS, 4):
        at = pointer + first + e % min(WORDS, 4)
        if MASKED:
            found = found + (tl.load(at, mask=mask, other=0),)
        else:
            found = found + (tl.load(at),)
    return found


@triton.jit
def _codes(codes, step, e, wanted, BITS: tl.constexpr, CHUNKS: tl.constexpr, MASKED: tl.constexpr):
    """The chunks of a step; zeros beyond the last, and where not `wanted`."""
    found = ()
    for chunk in tl.static_range(BITS):
        at = codes + (step * BITS + chunk) * 128 + e % 128
        # Past the first-level cache: no code is read twice.
        if MASKED:
            inside = wanted & (step * BITS + chunk < CHUNKS)
            found = found + (tl.load(at, mask=inside, other=0, cache_modifier=".cg"),)
        else:
            found = found + (tl.load(at, cache_modifier=".cg"),)
    return found


@triton.jit
def x_of_step(x, g, t, r, step, tokens, stride, TOKEN_TILES: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """What the lanes need of x for a step: for each tile and each 8 tokens two runs of eight values."""
    found = ()
    for tile in tl.static_range(4):
        for eight in tl.static_range(TOKEN_TILES):
            token = g + 8 * eight
            for half in tl.static_range(2):
                word = step * 128 + tile * 32 + half * 16 + t * 4 + r
                inside = token < tokens
                if MASKED:
                    inside = inside & (word < WORDS)
                found = found + (tl.load(x + token * (stride * 4) + word, mask=inside, other=0),)
    return found


@triton.jit
def tables_of_row(table, tile, g, e, TABLE_WORDS: tl.constexpr, ONE_TABLE: tl.constexpr):
    """Tables of row g and, where rows have their own, of row g + 8.

    One for all is stored 8 times, because what is the same for all lanes would be put into uniform registers, and
    copied from there again and again.
    """
    if ONE_TABLE:
        found = quadruples(table + g * TABLE_WORDS, e, True, TABLE_WORDS, False)
    else:
        own = table + (tile * 16 + g) * TABLE_WORDS
        found = quadruples(own, e, True, TABLE_WORDS, False)
        found = found + quadruples(own + 8 * TABLE_WORDS, e, True, TABLE_WORDS, False)
    return found


@triton.jit
def of_rows(
    table,
    zero,
    tile,
    g,
    e,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ONE_TABLE: tl.constexpr,
):
    """What all steps of a row share: its tables, or its zero point where it has one scale."""
    found = ()
    if TABLE_WORDS:
        found = tables_of_row(table, tile, g, e, TABLE_WORDS, ONE_TABLE)
    if ZERO_WORDS and not SCALE_WORDS:
        found = quadruples(zero + tile * 8 + g, e, True, 1, False)
    return found


@triton.jit
def no_totals(TOKEN_TILES: tl.constexpr, WARPS: tl.constexpr):
    """Sums before the first step."""
    found = ()
    for _ in tl.static_range(TOKEN_TILES):
        found = found + (tl.zeros([128 * WARPS], tl.float32),)
    return found


@triton.jit
def store_totals(
    totals,
    scale,
    bias,
    y,
    tokens,
    rows,
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WARPS_K: tl.constexpr,
    SCALE_OF_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add the warps' sums, scale and store. A register's place in the result is that of mma's C and D."""
    tall: tl.constexpr = WARPS // WARPS_K
    place = tl.arange(0, 128)[None, :]
    row = (tl.program_id(0) * tall + tl.arange(0, tall)[:, None]) * 16 + place // 16 + place % 4 // 2 * 8
    for eight in tl.static_range(TOKEN_TILES):
        total = tl.sum(tl.reshape(totals[eight], [tall, WARPS_K, 128]), axis=1)
        token = 8 * eight + place // 4 % 4 * 2 + place % 2
        if SCALE_OF_ROW:
            total *= tl.load(scale + row, mask=row < rows, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(y + token * rows + row, total.to(y.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit
def multiply(totals, codes, x, others, TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr, TOKEN_TILES: tl.constexpr):
    """The totals after a step."""
    return tl.inline_asm_elementwise(
        TEXT, CONSTRAINTS, totals + codes + x + others, dtype=SUMS[TOKEN_TILES], is_pure=True, pack=4
    )


@triton.jit(do_not_specialize=["tokens", "rows", "tile_rows", "stride"])
def skinny(
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
    stride,
    TEXT: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ONE_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WARPS_K: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD_X: tl.constexpr,
):
    """`tokens` of x by all rows.

    Args:
        x: pairs of values as words; rows are `stride` times 16 bytes apart.
        scale: words of groups, or float32 for each row where SCALE_WORDS is 0.
        zero: words of groups, or of rows where SCALE_WORDS is 0.
        CHUNKS, WORDS: of codes in a row of tiles, and of x in a row.
        STEPS: of 256 columns in a row, the last may be short.
        EVEN: whether they are whole and the same for each warp.
        AHEAD_X: whether x too is asked for a step ahead.
    """
    mine: tl.constexpr = (STEPS + WARPS_K - 1) // WARPS_K
    # Four consecutive elements a thread: a tensor is four registers of each lane, and 16 bytes to load.
    e = tl.arange(0, 128 * WARPS)
    g, t, r, warp = e // 16 % 8, e // 4 % 4, e % 4, e // 128
    first, tile = warp % WARPS_K, tl.program_id(0) * (WARPS // WARPS_K) + warp // WARPS_K
    tile = tl.minimum(tile, tile_rows - 1)  # rows that do not exist are not stored
    codes += tile * (CHUNKS * 128)
    others = of_rows(table, zero, tile, g, e, SCALE_WORDS, ZERO_WORDS, TABLE_WORDS, ONE_TABLE)
    scale_at = scale
    if SCALE_WORDS:
        scale_at = scale + (tile * STEPS * 8 + g) * SCALE_WORDS
    zero_at = zero + (tile * STEPS * 8 + g) * ZERO_WORDS
    totals = no_totals(TOKEN_TILES, WARPS)

    now = _codes(codes, first, e, True, BITS, CHUNKS, not EVEN)
    now_s = _scales(scale_at, zero_at, e, first, True, STEPS, SCALE_WORDS, ZERO_WORDS, not EVEN)
    if AHEAD_X:
        now_x = x_of_step(x, g, t, r, first, tokens, stride, TOKEN_TILES, WORDS, not EVEN)
    for turn in range(mine // 2):
        step = first + 2 * turn * WARPS_K
        later = _codes(codes, step + WARPS_K, e, True, BITS, CHUNKS, not EVEN)
        later_s = _scales(scale_at, zero_at, e, step + WARPS_K, True, STEPS, SCALE_WORDS, ZERO_WORDS, not EVEN)
        if AHEAD_X:
            later_x = x_of_step(x, g, t, r, step + WARPS_K, tokens, stride, TOKEN_TILES, WORDS, not EVEN)
        else:
            now_x = x_of_step(x, g, t, r, step, tokens, stride, TOKEN_TILES, WORDS, not EVEN)
        totals = multiply(totals, now, now_x, now_s + others, TEXT, CONSTRAINTS, TOKEN_TILES)
        wanted = 2 * turn + 2 < mine
        now = _codes(codes, step + 2 * WARPS_K, e, wanted, BITS, CHUNKS, True)
        now_s = _scales(scale_at, zero_at, e, step + 2 * WARPS_K, wanted, STEPS, SCALE_WORDS, ZERO_WORDS, True)
        if AHEAD_X:
            now_x = x_of_step(x, g, t, r, step + 2 * WARPS_K, tokens, stride, TOKEN_TILES, WORDS, True)
        else:
            later_x = x_of_step(x, g, t, r, step + WARPS_K, tokens, stride, TOKEN_TILES, WORDS, not EVEN)
        totals = multiply(totals, later, later_x, later_s + others, TEXT, CONSTRAINTS, TOKEN_TILES)
    if mine % 2:
        if not AHEAD_X:
            last = first + (mine - 1) * WARPS_K
            now_x = x_of_step(x, g, t, r, last, tokens, stride, TOKEN_TILES, WORDS, not EVEN)
        totals = multiply(totals, now, now_x, now_s + others, TEXT, CONSTRAINTS, TOKEN_TILES)
    store_totals(totals, scale, bias, y, tokens, rows, TOKEN_TILES, WARPS, WARPS_K, SCALE_WORDS == 0, HAS_BIAS)


@triton.jit
def _scales(
    scale,
    zero,
    e,
    step,
    wanted,
    STEPS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scales and zero points of the groups of a step, where there are groups."""
    found = ()
    if SCALE_WORDS:
        inside = wanted & (step < STEPS)
        found = quadruples(scale + step * (8 * SCALE_WORDS), e, inside, SCALE_WORDS, MASKED)
        if ZERO_WORDS:
            found = found + quadruples(zero + step * (8 * ZERO_WORDS), e, inside, ZERO_WORDS, MASKED)
    return found
