import pytest
import torch

from qat.errors import InputError
from qat.numerics.granularity import PerFlatGroup, parse_granularity, refuse_padding

SPELLINGS = [
    "per_tensor",
    "per_channel",
    "per_channel_1",
    "per_channel_-1",
    "per_token",
    "per_group_4",
    "per_block_2x4",
]


@pytest.mark.parametrize("spelling", [*SPELLINGS, "per_flat_group_5"])
def test_unview_undoes_view(spelling):
    granularity = parse_granularity(spelling)
    for shape in [(6, 8), (2, 6, 8)]:
        x = torch.arange(torch.tensor(shape).prod()).view(shape)
        assert torch.equal(granularity.unview(granularity.view(x), shape), x)
    assert str(granularity) == spelling


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_group_is_what_shares_a_scale(spelling):
    """A scale of `param_shape`, spread over x by repetition, is constant on every row of the view."""
    granularity, shape = parse_granularity(spelling), (6, 8)
    sizes = granularity.param_shape(shape)
    assert all(whole % part == 0 for whole, part in zip(shape, sizes, strict=True))
    scale = torch.arange(torch.tensor(sizes).prod()).view(sizes)
    for axis, (whole, part) in enumerate(zip(shape, sizes, strict=True)):
        scale = scale.repeat_interleave(whole // part, axis)
    view = granularity.view(scale)
    assert torch.equal(view, torch.arange(len(view))[:, None].expand_as(view))


def test_flat_groups_pad_the_last():
    view = PerFlatGroup(5).view(torch.ones(3, 4))
    assert view.shape == (3, 5)
    assert view.sum() == 12


def test_sizes_that_do_not_divide_name_those_that_do():
    with pytest.raises(InputError, match=r"does not divide 576. Sizes that do: .*64.*"):
        parse_granularity("per_group_128").param_shape((10, 576))


@pytest.mark.parametrize(
    ("spelling", "shape", "sizes"),
    [
        ("per_block_3x4", (8, 8), "1, 2, 4, 8"),
        ("per_group_5", (2, 7), "1, 7"),
        ("per_group_7", (2, 64), "8, 16, 32, 64"),
    ],
)
def test_few_sizes_that_divide_are_all_named(spelling, shape, sizes):
    with pytest.raises(InputError, match=f"Sizes that do: {sizes}\\."):
        parse_granularity(spelling).param_shape(shape)


def test_a_group_filled_up_is_refused_where_zeros_count():
    with pytest.raises(InputError, match=r"flat group size 64 does not divide 70. Sizes that do: 10, 14, 35, 70"):
        refuse_padding(PerFlatGroup(64), (7, 10))
    refuse_padding(PerFlatGroup(35), (7, 10))
    for spelling in SPELLINGS:
        refuse_padding(parse_granularity(spelling), (7, 10))


@pytest.mark.parametrize("spelling", ["per_chanel", "per_group", "per_group_0", "per_block_4"])
def test_misspelt_granularities_are_refused(spelling):
    with pytest.raises(InputError):
        parse_granularity(spelling)


def test_the_nearest_spelling_is_offered():
    with pytest.raises(InputError, match="Did you mean 'per_channel'"):
        parse_granularity("per_chanel")
