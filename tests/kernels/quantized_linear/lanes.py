"""Tile order as a lane sees it: slow, obvious and written from the PTX ISA, not from `tiles.py`."""

TILES_OF_STEP = 4


def fragment_a(lane):
    """(row, k) of the two halves of the registers a0 ... a3 of mma.m16n8k16 (PTX ISA 9.7.14.5.8), low half first."""
    group, thread = lane // 4, lane % 4
    places = []
    for register in range(4):
        row = group if register in (0, 2) else group + 8
        k = thread * 2 + (8 if register >= 2 else 0)
        places.append([(row, k), (row, k + 1)])
    return places


def fragment_b(lane):
    """(k, column) of the two halves of the registers b0 and b1."""
    group, thread = lane // 4, lane % 4
    return [[(thread * 2 + 8 * register + half, group) for half in range(2)] for register in range(2)]


def fragment_c(lane):
    """(row, column) of the registers c0 ... c3."""
    group, thread = lane // 4, lane % 4
    return [(group + (8 if register >= 2 else 0), thread * 2 + register % 2) for register in range(4)]


def x_registers(lane, tile):
    """Columns in a step of the two halves of the 8 registers of x that a lane loads for `tile`: 16 bytes twice."""
    thread = lane % 4
    columns = [64 * tile + 32 * load + 8 * thread + i for load in range(2) for i in range(8)]
    return [columns[2 * i : 2 * i + 2] for i in range(8)]


def registers(chunks, lane):
    """The 4 words that `lane` loads of each of `chunks`, lists of 128 words."""
    return [[chunk[4 * lane + i] & 0xFFFFFFFF for i in range(4)] for chunk in chunks]


def bits_at(word, at, count):
    return (word >> at) & ((1 << count) - 1)


def tile_words(loaded, tile, bits):
    """The words of `tile` of a step, in the order of use: for 3 bits (low bits, low bits, high bits)."""
    if bits == 4:
        return loaded[tile]
    if bits == 8:
        return loaded[2 * tile] + loaded[2 * tile + 1]
    low = loaded[tile // 2][2 * (tile % 2) : 2 * (tile % 2) + 2]
    return low if bits == 2 else [*low, loaded[2][tile]]


def codes_of_tile(words, bits, tables):
    """codes[q][register][half] of a lane: what stands in its words for the four instructions of a tile."""
    codes = []
    for q in range(4):
        codes.append([[code_at(words, bits, tables, q, register, half) for half in range(2)] for register in range(4)])
    return codes


def code_at(words, bits, tables, q, register, half):
    row_half, e = register % 2, 2 * (register // 2) + half
    if bits == 8:  # a0 a1 in the first of two words, bytes 0 and 2 are a pair
        return bits_at(words[2 * q + register // 2], 8 * row_half + 16 * half, 8)
    if bits == 4:
        return bits_at(words[q], 16 * row_half + 4 * e if tables else 4 * register + 16 * half, 4)
    word, second = words[q // 2], q % 2
    low = bits_at(word, 16 * row_half + 4 * e + 2 * second if tables else 2 * (4 * second + register) + 16 * half, 2)
    if bits == 2:
        return low
    if tables:  # of each nibble: bits 2, 3 for the first of two instructions, 0, 1 for the second
        at = 4 * (4 * row_half + e) + (0 if second else 2) + q // 2
    else:
        at = [2, 4, 6, 8, 10, 12, 14, 0][4 * second + register] + q // 2 + 16 * half
    return low | bits_at(words[2], at, 1) << 2
