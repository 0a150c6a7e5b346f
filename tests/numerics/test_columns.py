"""The grids of columns, alone and on top of each other."""

import pytest
import torch

from qat.numerics.columns import Columns
from qat.numerics.gptq import gptq
from tests.numerics.test_gptq import GRIDS, SHAPE, columns, fixed, problem


def three_layers(grid):
    """Weights of unlike magnitude, each with its own grid, and the X^T X of what they all read."""
    weight, x = problem()
    weights = [weight, weight.flip(0) * 3, torch.randn(SHAPE) * 0.02]
    return weights, [columns(fixed(GRIDS[grid], own), own) for own in weights], x.t() @ x


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_stacked_columns_round_as_each_does(grid):
    weights, own, _ = three_layers(grid)
    stacked, whole = Columns.stacked(own), torch.cat(weights)
    for i in range(SHAPE[1]):
        alone = [part.round(weight[:, i], i) for part, weight in zip(own, weights, strict=True)]
        assert torch.equal(stacked.round(whole[:, i], i), torch.cat(alone))


@pytest.mark.parametrize("grid", ["int4 group", "int2 asymmetric", "k-means row", "nf4 double"])
@torch.no_grad()
def test_gptq_of_stacked_layers_is_that_of_each(grid):
    weights, own, h = three_layers(grid)
    together = gptq(torch.cat(weights), h, Columns.stacked(own))
    alone = torch.cat([gptq(weight, h, part) for weight, part in zip(weights, own, strict=True)])
    assert (together != alone).float().mean() < 0.01  # products of other shapes are summed in another order


def test_only_grids_of_one_kind_are_stacked():
    kinds = {
        name: three_layers(name)[1][0].kind for name in ("int4 group", "int4 block", "int3 channel", "k-means row")
    }
    assert kinds["int4 group"] == kinds["int4 block"]
    assert len(set(kinds.values())) == 3
