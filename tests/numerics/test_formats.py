"""Every grid: its codes, its rounding, its name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.errors import InputError
from qat.numerics.formats import CodebookFormat, FloatFormat, IntFormat, LevelFormat, VectorFormat, parse_format

FLOATS = [FloatFormat(e, m) for e, m in ((4, 3), (5, 2), (2, 3), (3, 2), (2, 1))]
FORMATS = [
    *(IntFormat(b, s) for b in range(2, 9) for s in (True, False)),
    *(LevelFormat(n) for n in (2, 3, 4, 8, 256)),
    *FLOATS,
    *(CodebookFormat(n) for n in (2, 3, 16, 40, 256)),
]
EVERY = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def codebook_for(format, rows=1):
    if not isinstance(format, CodebookFormat):
        return None
    return torch.linspace(-2, 2, format.entries).add(0.3 / format.entries).expand(rows, -1).contiguous()


def finite_codes(format):
    """Every code that encoding can return."""
    low, high = format.code_range
    codes = torch.arange(low, high + 1)
    if isinstance(format, FloatFormat):
        codes = codes[codes % 2 ** (format.bits - 1) <= format.highest]
    return codes.to(format.code_dtype)[None]


def grid(format):
    return format.decode(finite_codes(format), codebook_for(format))[0].sort().values


@EVERY
def test_encode_finds_the_nearest_grid_value(format):
    values = grid(format)
    v = torch.linspace(float(values[0]) - 0.4, float(values[-1]) + 0.4, 999)[None]
    distance = (v[0, :, None] - values).abs()
    codebook = codebook_for(format)
    chosen = (v - format.decode(format.encode(v, codebook), codebook)).abs()[0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-6)


@EVERY
def test_every_code_is_reached_and_names_read_back(format):
    codes, codebook = finite_codes(format), codebook_for(format)
    assert torch.equal(format.encode(format.decode(codes, codebook), codebook), codes)
    assert codes.numel() <= 2**format.bits
    assert parse_format(format.name) == format


@EVERY
def test_decode_fills_memory_that_is_given(format):
    codes, codebook = finite_codes(format), codebook_for(format)
    out = torch.full(codes.shape, torch.nan)
    assert format.decode(codes, codebook, out=out) is out
    assert torch.equal(out, format.decode(codes, codebook))


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@EVERY
@settings(max_examples=60, deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=40))
def test_encoding_is_monotone_idempotent_and_half_a_step_off_at_most(format, values):
    """For any finite numbers, denormals included."""
    v, codebook, values = torch.tensor(values)[None].sort().values, codebook_for(format), grid(format)
    rounded = format.decode(format.encode(v, codebook), codebook)
    assert torch.isfinite(rounded).all()
    assert (rounded.diff() >= 0).all()
    assert torch.equal(format.decode(format.encode(rounded, codebook), codebook), rounded)
    inside = v.clamp(values[0], values[-1])
    above = torch.searchsorted(values, inside[0]).clamp(1, len(values) - 1)
    step = values[above] - values[above - 1]
    assert ((rounded - inside).abs() <= step / 2 * (1 + 1e-6)).all()


@EVERY
def test_stochastic_codes_are_neighbours_whose_mean_is_the_value(format):
    values, codebook = grid(format), codebook_for(format)
    v = torch.rand(64) * (values[-1] - values[0]) + values[0]
    draws = v.expand(4000, -1).contiguous()
    rounded = format.decode(format.encode(draws, codebook, torch.rand_like(draws)), codebook)
    above = torch.searchsorted(values, v).clamp(1, len(values) - 1)
    step = values[above] - values[above - 1]
    assert ((rounded - v).abs() <= step * (1 + 1e-5)).all()
    assert ((rounded.mean(0) - v).abs() <= 4.5 * step / 2 / 4000**0.5 + 1e-6).all()


@pytest.mark.parametrize("format", FLOATS[:2], ids=lambda f: f.name)
def test_eight_bit_floats_are_those_of_torch(format):
    native = {3: torch.float8_e4m3fn, 2: torch.float8_e5m2}[format.mantissa_bits]
    every = torch.arange(256, dtype=torch.uint8)
    theirs = every.view(native).float()
    known = torch.isfinite(theirs)
    assert torch.equal(format.decode(every[None])[0][known], theirs[known])
    v = torch.randn(1, 10_000) * torch.logspace(-8, 2, 10_000)
    ours = format.encode_(v.clone(), noise=torch.full_like(v, 0.5))
    ties_aside = (format.decode(ours.to(torch.uint8)) - v).abs() < 0.4999 * v.abs()
    assert torch.equal(ours.to(torch.uint8)[ties_aside], v.to(native).view(torch.uint8)[ties_aside])


def test_four_bit_floats_are_those_of_the_specification():
    assert grid(FloatFormat(2, 1)).unique().tolist() == [
        *(-6, -4, -3, -2, -1.5, -1, -0.5),
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6),
    ]
    largest = {f.name: (f.range()[1], f.largest_exponent) for f in FLOATS}
    assert largest == {
        "fp8_e4m3": (448, 8),
        "fp8_e5m2": (57344, 15),
        "fp6_e2m3": (7.5, 2),
        "fp6_e3m2": (28, 4),
        "fp4_e2m1": (6, 2),
    }


def test_ties_go_to_the_even_mantissa():
    v = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0]])
    rounded = FloatFormat(2, 1).decode(FloatFormat(2, 1).encode(v))
    assert rounded[0].tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4]


def test_few_levels_lie_around_zero():
    assert grid(LevelFormat(2)).tolist() == [-0.5, 0.5]
    assert grid(LevelFormat(3)).tolist() == [-1, 0, 1]
    assert grid(LevelFormat(4)).tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_a_vector_code_is_the_nearest_pair():
    format = VectorFormat(16)
    table = torch.randn(3, 16 * 2)
    v = torch.randn(6, 10)
    codes = format.encode(v, table)
    assert codes.shape == (6, 5)
    pairs, entries = v.view(3, 10, 2), table.view(3, 16, 2)
    nearest = (pairs[:, :, None] - entries[:, None]).square().sum(3).argmin(2)
    assert torch.equal(codes.view(3, 10).long(), nearest)
    assert torch.equal(
        format.decode(codes, table).view(3, 10, 2), entries.gather(1, nearest[..., None].expand(3, 10, 2))
    )
    assert parse_format("vector16x2") == format


@pytest.mark.parametrize(
    "name",
    ["int1", "int9", "codebook1", "codebook300", "fp3", "fp8_e3m4", "levels1", "vector16x3", "vector512x2", "int"],
)
def test_unknown_formats_are_refused(name):
    with pytest.raises(InputError):
        parse_format(name)


def test_the_nearest_name_is_proposed():
    with pytest.raises(InputError, match="Did you mean 'fp8_e4m3'"):
        parse_format("fp8_e4m3fn")


def test_a_codebook_of_the_wrong_size_is_refused():
    with pytest.raises(InputError, match=r"needs a codebook \[rows, 16\]"):
        CodebookFormat(16).encode(torch.zeros(1, 4), torch.zeros(1, 8))
