"""Scales of small error."""

import pytest
import torch

from qat.numerics.dynamic import absmax_params, minmax_params
from qat.numerics.formats import FloatFormat, IntFormat
from qat.numerics.qtensor import scale_down, unscale
from qat.numerics.search import half_quadratic_scale, least_place, least_squares_scale

GRIDS = {
    "int3": (IntFormat(3), absmax_params),
    "uint3": (IntFormat(3, signed=False), minmax_params),
    "uint4": (IntFormat(4, signed=False), minmax_params),
    "fp4": (FloatFormat(2, 1), absmax_params),
}


def heavy_tailed(groups=256, size=64):
    return torch.distributions.StudentT(4.0).sample((groups, size)) * 0.02


def searched(grid, x):
    """The format, where the search starts, and what it finds for squares and for the robust error."""
    format, rule = GRIDS[grid]
    start = rule(x, format, torch.bfloat16)
    squares = start._replace(scale=least_squares_scale(x, format, start))
    return format, start, squares, start._replace(scale=half_quadratic_scale(x, format, start, torch.bfloat16))


def errors(x, params, format, power):
    """Of each group."""
    x_hat = unscale(format.decode(format.encode_(scale_down(x, params))), params)
    return (x_hat - x).abs().pow(power).sum(1)


@pytest.mark.parametrize("grid", GRIDS)
def test_each_lowers_its_own_error(grid):
    x = heavy_tailed()
    format, start, squares, robust = searched(grid, x)
    for found, power in ((squares, 2.0), (robust, 0.7)):
        before, after = errors(x, start, format, power), errors(x, found, format, power)
        assert (after <= before).all()
        assert after.sum() < 0.97 * before.sum()
    assert errors(x, squares, format, 2.0).sum() < errors(x, robust, format, 2.0).sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_robust_scales_can_be_stored(grid):
    scale = searched(grid, heavy_tailed())[3].scale
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("grid", GRIDS)
def test_the_magnitude_of_the_weights_does_not_matter(grid):
    x = heavy_tailed()
    assert torch.equal(searched(grid, 1024 * x)[3].scale, 1024 * searched(grid, x)[3].scale)


def test_outliers_are_clipped_and_most_elements_get_nearer():
    x = heavy_tailed()
    format, start, _, robust = searched("uint3", x)
    assert (robust.scale <= start.scale).double().mean() > 0.95
    inner = x.clamp(-0.03, 0.03)
    assert errors(inner, robust, format, 2.0).sum() < 0.8 * errors(inner, start, format, 2.0).sum()


@pytest.mark.parametrize("x", [torch.zeros(4, 32), torch.full((4, 32), 0.3), torch.full((4, 32), -1e-30)], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_groups_without_spread_keep_a_scale(grid, x):
    format, _, _, found = searched(grid, x)
    assert (found.scale > 0).all()
    assert torch.isfinite(errors(x, found, format, 1.0)).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_trying_few_factors_is_nearly_as_good_as_trying_all(grid):
    x = heavy_tailed(groups=4096)
    format, start, squares, _ = searched(grid, x)
    all_errors = [
        errors(x, start._replace(scale=start.scale * shrink), format, 2.0) for shrink in torch.linspace(1.0, 0.4, 25)
    ]
    least = torch.stack(all_errors).amin(0)
    assert least.sum() <= errors(x, squares, format, 2.0).sum() < 1.005 * least.sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_groups_are_searched_each_on_its_own_however_many_there_are(grid):
    x = heavy_tailed(groups=5000)  # more than one block of the search
    format, start, squares, _ = searched(grid, x)
    weights = torch.rand_like(x)
    weighted = least_squares_scale(x, format, start, importance=weights)
    for own in (slice(0, 3), slice(4990, 5000)):
        part = start._replace(
            scale=start.scale[own], zero_point=None if start.zero_point is None else start.zero_point[own]
        )
        assert torch.equal(least_squares_scale(x[own], format, part), squares.scale[own])
        assert torch.equal(least_squares_scale(x[own], format, part, importance=weights[own]), weighted[own])


@pytest.mark.parametrize("count", [1, 2, 4, 20])
def test_the_bottom_of_a_valley_is_found_by_few_tries(count):
    for bottom in range(count):
        tried = []
        assert least_place(lambda place: tried.append(place) or float(abs(place - bottom)), count) == bottom  # noqa: B023
        assert len(set(tried)) == len(tried) <= 9
