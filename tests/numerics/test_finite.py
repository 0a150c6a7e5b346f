"""NaN and infinity are found wherever they are."""

import pytest
import torch

from qat.numerics.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 77, 998])
def test_one_bad_element_is_found(bad, dtype, place):
    x = torch.randn(999).to(dtype)
    assert all_finite(x)
    x[place] = bad
    assert not all_finite(x)


def test_nothing_is_finite_and_so_are_the_largest_numbers():
    assert all_finite(torch.empty(0, 4))
    assert all_finite(torch.full((4,), torch.finfo(torch.float32).max))
