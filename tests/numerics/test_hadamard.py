"""Hadamard matrices and random rotations."""

import pytest
import torch

from qat.numerics.hadamard import cayley_step, hadamard, mean_keeping, orthogonal, rotation

# Hidden and head sizes of models: Llama, Qwen, SmolLM, GPT-2, Phi.
SIZES = (16, 64, 80, 96, 128, 576, 768, 896, 960, 1536, 2048, 2560)


def is_orthogonal(matrix):
    return torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, *SIZES])
def test_rows_are_orthogonal_and_hold_only_ones(order):
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 10, 18, 33, 90])
def test_there_is_none_of_most_orders(order):
    assert hadamard(order) is None


@pytest.mark.parametrize("size", [*SIZES, 15, 50, 90, 468])
def test_rotations_of_every_size_are_orthogonal(size):
    generator = torch.Generator().manual_seed(0)
    assert is_orthogonal(rotation(size, generator))
    assert is_orthogonal(orthogonal(size, generator))


@pytest.mark.parametrize("size", SIZES)
def test_a_single_outlier_spreads_over_all_channels_alike(size):
    x = torch.zeros(size, dtype=torch.float64)
    x[3] = 1
    y = x @ rotation(size, torch.Generator().manual_seed(0))
    assert torch.allclose(y.abs(), torch.full_like(y, size**-0.5))


@pytest.mark.parametrize("size", [16, 64, 90])
def test_some_keep_the_mean_and_still_mix_the_rest(size):
    matrix = mean_keeping(size, torch.Generator().manual_seed(0))
    ones = torch.ones(size, dtype=torch.float64)
    assert is_orthogonal(matrix)
    assert torch.allclose(matrix @ ones, ones)
    assert torch.allclose(ones @ matrix, ones)
    assert matrix.abs().max() < 0.9


def test_seeds_give_rotations_of_their_own():
    first, same, other = (rotation(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_cayley_steps_go_downhill_and_stay_orthogonal(keep_mean):
    generator = torch.Generator().manual_seed(0)
    target = mean_keeping(16, generator)
    matrix = start = torch.eye(16, dtype=torch.float64)
    for _ in range(200):
        matrix = cayley_step(matrix, 2 * (matrix - target), 0.1, keep_mean)
    assert is_orthogonal(matrix)
    assert (matrix - target).norm() < 0.5 * (start - target).norm()
    if keep_mean:
        assert torch.allclose(matrix.sum(1), torch.ones(16, dtype=torch.float64))
