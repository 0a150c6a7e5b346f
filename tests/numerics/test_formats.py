import pytest
import torch

from qat.errors import InputError
from qat.numerics.formats import CodebookFormat, IntFormat, parse_format

FORMATS = [
    *(IntFormat(b, s) for b in range(2, 9) for s in (True, False)),
    *(CodebookFormat(n) for n in (2, 3, 16, 40, 256)),
]


def codebook_for(format, rows=1):
    if isinstance(format, IntFormat):
        return None
    return torch.randn(rows, format.entries).sort(dim=1).values


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_encode_finds_the_nearest_grid_value(format):
    codebook = codebook_for(format)
    low, high = format.code_range
    every_code = torch.arange(low, high + 1).to(format.code_dtype)[None]
    grid = format.decode(every_code, codebook)
    v = torch.linspace(float(grid.min()) - 0.4, float(grid.max()) + 0.4, 999)[None]
    distance = (v[0, :, None] - grid[0]).abs()
    chosen = (v - format.decode(format.encode(v, codebook), codebook)).abs()[0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_code_is_reached_and_names_read_back(format):
    codebook = codebook_for(format)
    low, high = format.code_range
    codes = torch.arange(low, high + 1).to(format.code_dtype)[None]
    assert torch.equal(format.encode(format.decode(codes, codebook), codebook), codes)
    assert high - low + 1 <= 2**format.bits
    assert parse_format(format.name) == format


def test_encode_is_monotone():
    v = torch.randn(1, 1000).sort().values
    for format in FORMATS:
        assert (format.encode(v, codebook_for(format)).int().diff() >= 0).all()


@pytest.mark.parametrize("name", ["int1", "int9", "codebook1", "codebook300", "fp3", "int"])
def test_unknown_formats_are_refused(name):
    with pytest.raises(InputError):
        parse_format(name)


def test_a_codebook_of_the_wrong_size_is_refused():
    with pytest.raises(InputError, match=r"needs a codebook \[rows, 16\]"):
        CodebookFormat(16).encode(torch.zeros(1, 4), torch.zeros(1, 8))
