"""The grid values around an element."""

import pytest
import torch

from qat.errors import InputError
from qat.numerics.formats import CodebookFormat, FloatFormat, IntFormat, LevelFormat, VectorFormat
from qat.numerics.gaps import clipped, gaps
from qat.numerics.qtensor import ViewParams, scale_down, unscale

CODEBOOK = torch.tensor([[-1.0, -0.25, 0.0, 0.5], [-0.5, 0.0, 0.25, 1.0]])
GRIDS = {
    "int3": (IntFormat(3), None, None),
    "uint3": (IntFormat(3, signed=False), torch.tensor([[3.0], [0.0], [7.0], [4.0]]), None),
    "levels4": (LevelFormat(4), None, None),
    "fp4": (FloatFormat(2, 1), None, None),
    "codebook4": (CodebookFormat(4), None, CODEBOOK),
}


def case(grid):
    format, zero_point, codebook = GRIDS[grid]
    return format, ViewParams(torch.tensor([[0.5], [1.0], [0.1], [2.0]]), zero_point, codebook)


def rounded(view, params, format):
    codes = format.encode_(scale_down(view, params), params.codebook)
    return unscale(format.decode(codes, params.codebook), params)


def grid_values(params, format, group):
    """All values that elements of a group can have, ascending."""
    codes = torch.arange(format.code_range[0], format.code_range[1] + 1)[None]
    if params.codebook is not None:
        params = params._replace(codebook=params.codebook[group // 2][None])
    own = ViewParams(*(field if field is None or field is params.codebook else field[group, None] for field in params))
    return unscale(format.decode(codes, own.codebook), own)[0].unique()


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_the_distance_of_the_grid_values_around_an_element(grid):
    format, params = case(grid)
    x = 4 * torch.randn(4, 200) * params.scale
    found = gaps(x, params, format)
    for group, own in enumerate(x):
        values = grid_values(params, format, group)
        for element, gap in zip(own, found[group], strict=True):
            below = (values < element).sum().clamp(1, len(values) - 1)
            assert torch.isclose(gap, values[below] - values[below - 1])


@pytest.mark.parametrize("grid", ["int3", "uint3", "levels4"])
def test_half_of_it_leads_to_both_grid_values_on_an_even_grid(grid):
    format, params = case(grid)
    x = torch.rand(4, 500) * params.scale
    down, up = (rounded(x + side * 0.4999 * gaps(x, params, format), params, format) for side in (-1, 1))
    spread = ((up - down) / params.scale).round()
    assert (spread <= 1).all()
    assert (spread[[0, 3]] == 1).double().mean() > 0.95


def test_the_gap_of_integers_is_the_scale():
    format, params = case("int3")
    x = 8 * torch.randn(4, 100)
    assert torch.allclose(gaps(x, params, format), params.scale.expand_as(x))


@pytest.mark.parametrize("grid", ["fp4", "codebook4"])
def test_the_scale_has_the_gradient_of_the_end_beyond_it(grid):
    format, params = case(grid)
    scale = params.scale.clone().requires_grad_()
    x = torch.full((4, 3), 100.0)
    clipped(x, params._replace(scale=scale), format).sum().backward()
    ends = params.codebook[:, -1].repeat_interleave(2) if params.codebook is not None else torch.full((4,), 6.0)
    assert torch.equal(scale.grad[:, 0], 3 * ends)


def test_vector_codes_have_no_gaps():
    with pytest.raises(InputError, match="scalar grid"):
        gaps(torch.randn(1, 8), ViewParams(torch.ones(1, 1), None, torch.randn(1, 8)), VectorFormat(4, 2))
