import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.numerics import packing
from qat.numerics.formats import CodebookFormat, IntFormat
from qat.numerics.packing import pack, packed_bytes, unpack

FORMATS = [CodebookFormat(2), CodebookFormat(5), *(IntFormat(b, s) for b in range(2, 9) for s in (True, False))]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 7), st.integers(1, 23))
def test_unpack_undoes_pack(format, rows, columns):
    low, high = format.code_range
    codes = torch.randint(low, high + 1, (rows, columns)).to(format.code_dtype)
    packed = pack(codes, format)
    assert packed.numel() == packed_bytes(codes.numel(), format.bits)
    assert torch.equal(unpack(packed, format, codes.shape), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_take_their_bits(bits):
    assert packed_bytes(1024, bits) == 1024 * bits // 8


def test_the_layout_is_the_written_one():
    """Code i of eight occupies bits [3i, 3i + 3), signed codes minus the lowest."""
    codes = torch.tensor([-4, -3, -2, -1, 0, 1, 2, 3], dtype=torch.int8)
    word = sum(value << (3 * i) for i, value in enumerate(range(8)))
    assert bytes(pack(codes, IntFormat(3)).tolist()) == word.to_bytes(3, "little")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("count", [15, 16, 17, 32, 40, 41])
def test_large_tensors_are_packed_part_by_part(format, count, monkeypatch):
    """To the same bytes."""
    low, high = format.code_range
    codes = torch.randint(low, high + 1, (count,)).to(format.code_dtype)
    whole = pack(codes, format)
    monkeypatch.setattr(packing, "_AT_ONCE", 16)
    assert torch.equal(pack(codes, format), whole)
    assert torch.equal(unpack(whole, format, codes.shape), codes)
