"""Decoding by PTX equals the obvious decoding, to the bit: on all half words, or on random words."""

import numpy as np
import pytest

from qat.kernels.quantized_linear import decode
from qat.kernels.quantized_linear.decode import BFLOAT16, FLOAT16, Table
from tests.kernels.quantized_linear import lanes, ptx
from tests.kernels.quantized_linear.ptx_floats import FROM_BITS, TO_BITS

OUTS = [f"a{i}" for i in range(8)]
REALS = pytest.mark.parametrize("real", [BFLOAT16, FLOAT16], ids=lambda real: real.name)


def words(count=1):
    """All 2^16 halves, low and high ones paired at random; for several words random ones."""
    generator = np.random.default_rng(0)
    low = np.arange(2**16, dtype=np.uint32)
    first = low | generator.permutation(low) << np.uint32(16)
    return [first, *(generator.integers(0, 2**32, 2**16, dtype=np.uint32) for _ in range(count - 1))]


def halves(register, real):
    return [FROM_BITS[real.name](register >> np.uint32(at) & np.uint32(0xFFFF)) for at in (0, 16)]


def expected_codes(found, bits, tables, second):
    """codes[instruction][register][half] of words that serve the first or the second two instructions of a tile."""
    low, high = found[0], found[-1]
    own = [low, low, high] if bits == 3 else {2: [low] * 2, 4: [low] * 4, 8: [low] * 8}[bits]
    return [
        [[lanes.code_at(own, bits, tables, q, register, half) for half in range(2)] for register in range(4)]
        for q in ((2 * second, 2 * second + 1) if bits in (2, 3) else (0,))
    ]


def blank(names):
    return dict.fromkeys(names)


@REALS
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize(("bits", "center"), [(2, 2), (2, 1), (2, 0), (3, 4), (3, 0), (3, 7), (4, 8), (4, 0), (4, 15)])
def test_integers(bits, center, second, real):
    found = words(2 if bits == 3 else 1)
    names = ["w0", "w1"][: len(found)]
    lines, offsets = decode.fixed_offsets(center, bits, real, "o")
    outs = OUTS[: 4 if bits == 4 else 8]
    lines += decode.integers(names, second, bits, real, offsets, outs)
    registers = ptx.run(lines, blank(outs) | dict(zip(names, found, strict=True)))
    flat = [pair for instruction in expected_codes(found, bits, False, second) for pair in instruction]
    for out, pair in zip(outs, flat, strict=True):
        for value, code in zip(halves(registers[out], real), pair, strict=True):
            assert (value == code.astype(np.float64) - center).all()


@REALS
@pytest.mark.parametrize("center", [128, 0, 255, 100])
def test_bytes(center, real):
    (word,) = words()
    lines, offsets = decode.fixed_offsets(center, 8, real, "o")
    registers = ptx.run([*lines, *decode.integers(["w"], 0, 8, real, offsets, OUTS[:2])], blank(OUTS[:2]) | {"w": word})
    for row, out in enumerate(OUTS[:2]):
        for half, value in enumerate(halves(registers[out], real)):
            assert (value == lanes.code_at([word] * 8, 8, False, 0, row, half).astype(np.float64) - center).all()


def test_signed_bytes_need_no_offset():
    assert decode.fixed_offsets(128, 8, BFLOAT16, "o") == ([], {})


@REALS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_each_row(bits, real):
    zeros = np.arange(2**bits, dtype=np.uint32)
    word = np.random.default_rng(1).integers(0, 2**32, (2**bits, 1), dtype=np.uint32)
    zero = (zeros | zeros[::-1] << np.uint32(16))[:, None]
    lines, offsets = decode.zero_offsets("z", bits, real, "o")
    names = [name for pair in offsets.values() for name in pair]
    outs = OUTS[: {4: 4, 8: 2}.get(bits, 8)]
    lines += decode.integers(["w", "w"], 0, bits, real, offsets, outs)
    # zero_offsets declares its registers itself.
    registers = ptx.run(lines, blank(outs) | {"w": word, "z": zero})
    assert set(names) <= set(registers)
    flat = [pair for instruction in expected_codes([word], bits, False, 0) for pair in instruction]
    for i, out in enumerate(outs):
        for value, code in zip(halves(registers[out], real), flat[i], strict=True):
            own = zeros if i % 2 == 0 else zeros[::-1]
            assert (value == code.astype(np.float64) - own[:, None]).all()


def table_registers(entries, real, name, whole=False):
    """Registers of a random table, and its values."""
    generator = np.random.default_rng(ord(name))
    if whole:
        values = generator.permutation(np.arange(-64, 64))[:entries].astype(np.float64)
        low, high = (values + 64).astype(np.uint32), None
    else:
        bits = TO_BITS[real.name](FROM_BITS[real.name](generator.integers(0, 0x7800, entries, dtype=np.uint32)))
        bits |= generator.integers(0, 2, entries, dtype=np.uint32) << np.uint32(15)
        values, low, high = FROM_BITS[real.name](bits), bits & np.uint32(255), bits >> np.uint32(8)
    registers, names = {}, []
    for plane, kind in ((low, "l"), (high, "h")):
        own = []
        for i in range(0 if plane is None else entries // 4):
            own.append(f"{name}{kind}{i}")
            registers[own[-1]] = np.uint32(sum(int(plane[4 * i + j]) << 8 * j for j in range(4)))
        names.append(own)
    return registers, Table(*names), values


@REALS
@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("whole", [False, True], ids=["any entries", "7-bit grid"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables(bits, whole, second, real):
    found = words(2 if bits == 3 else 1)
    names = ["w0", "w1"][: len(found)]
    (first, table_g, values_g), (other, table_h, values_h) = (
        table_registers(2**bits, real, name, whole) for name in ("g", "k")
    )
    selectors = ["s"] if bits == 4 else ["s", "r"]
    outs = OUTS[: 4 * len(selectors)]
    lines = decode.selectors(names, second, bits, selectors)
    lookup = decode.grid_table if whole else decode.table
    for i, selector in enumerate(selectors):
        lines += lookup(selector, 2**bits, (table_g, table_h), real, outs[4 * i : 4 * i + 4])
    inputs = dict(zip(names, found, strict=True))
    registers = ptx.run(lines, blank(outs) | blank(selectors) | inputs | first | other)
    flat = [pair for instruction in expected_codes(found, bits, True, second) for pair in instruction]
    for i, (out, pair) in enumerate(zip(outs, flat, strict=True)):
        own = values_h if i % 2 else values_g
        for value, code in zip(halves(registers[out], real), pair, strict=True):
            assert (value == own[code]).all()


def test_costs_are_those_that_the_text_names():
    """Instructions of the integer pipe for each weight; constants and moves are none in a loop."""
    integer_pipe = ("shr", "shl", "and", "or.", "lop3", "prmt")

    def cost(lines, weights):
        return sum(line.startswith(integer_pipe) for line in lines) / weights

    offsets = dict.fromkeys((0, 2, 4), ("o", "o"))
    four, two = (decode.integers(["w"], 0, bits, BFLOAT16, offsets, OUTS) for bits in (4, 2))
    assert cost(four, 8) == 7 / 8
    assert cost(two, 16) == 10 / 16
    assert cost(decode.integers(["w", "v"], 0, 3, BFLOAT16, offsets, OUTS), 16) == 21 / 16
    tables = (Table(["t"] * 4, ["t"] * 4),) * 2
    assert cost(decode.table("s", 16, tables, BFLOAT16, OUTS), 8) == 21 / 8
    assert cost(decode.grid_table("s", 16, tables, BFLOAT16, OUTS), 8) == 15 / 8
