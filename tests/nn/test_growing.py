import pytest
import torch

from qat.nn.growing import GrowingRows


def test_rows_are_those_appended():
    x, own = torch.randn(2, 3, 50, 4), GrowingRows(8)
    for part in x.split([1, 7, 1, 20, 21], dim=2):
        own.append(part)
    assert torch.equal(own.rows, x)
    assert own.rows.untyped_storage().nbytes() == 2 * 3 * 56 * 4 * 4


def test_it_stays_where_it_is_while_there_is_room():
    own = GrowingRows(16)
    own.append(torch.randn(1, 2, 3, 4))
    before = own.rows.data_ptr()
    own.append(torch.randn(1, 2, 13, 4))
    assert own.rows.data_ptr() == before
    own.append(torch.randn(1, 2, 1, 4))
    assert own.rows.data_ptr() != before


def test_cropping_then_going_on():
    x, own = torch.randn(1, 2, 20, 4), GrowingRows(8)
    own.append(x)
    own.crop(13)
    own.crop(30)
    assert torch.equal(own.rows, x[..., :13, :])
    own.append(x[..., :3, :])
    assert torch.equal(own.rows, torch.cat([x[..., :13, :], x[..., :3, :]], 2))


def test_changes_of_the_batch():
    x, own = torch.randn(2, 2, 5, 4), GrowingRows(8)
    own.map_batch(torch.clone)
    own.append(x)
    own.map_batch(lambda tensor: tensor[[1, 0, 1]])
    assert torch.equal(own.rows, x[[1, 0, 1]])
    own.append(torch.ones(3, 2, 1, 4))
    assert own.rows.shape == (3, 2, 6, 4)


def test_without_rows_there_is_nothing():
    with pytest.raises(AssertionError, match="nothing was appended"):
        _ = GrowingRows(8).rows


def test_what_inference_mode_began_goes_on_without_it():
    rows = GrowingRows(4)
    with torch.inference_mode():
        rows.append(torch.ones(2, 3, 5))
        rows.map_batch(lambda memory: memory.flip(0))
    with torch.no_grad():
        rows.append(torch.zeros(2, 1, 5))
    assert rows.rows.sum() == 2 * 3 * 5
