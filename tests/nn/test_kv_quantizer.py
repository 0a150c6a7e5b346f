from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat.errors import InputError
from qat.nn.kv_quantizer import KVQuantizer, Schedule
from qat.quantizers import MinMaxQuantizer

INT4 = MinMaxQuantizer((0, 16), bits=4, granularity="per_token")
BLOCKS = MinMaxQuantizer((0, 16), bits=2, granularity="per_block_4x1", symmetric=False)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(1, 0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (Schedule(1, 3), [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]),
        (Schedule(4, 0), [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]),
        (Schedule(4, 3), [0, 0, 0, 0, 0, 0, 0, 4, 4, 4]),
        (Schedule(0, 3), [0] * 10),
    ],
    ids=["token", "window", "group", "group_and_window", "never"],
)
def test_how_many_tokens_are_quantized_at_each_length(schedule, expected):
    assert [schedule.quantized_until(length) for length in range(10)] == expected
    assert schedule.quantized_until(torch.arange(10)).tolist() == expected


@settings(deadline=None)
@given(group=st.integers(1, 64), window=st.integers(0, 200), length=st.integers(0, 1000))
def test_whole_groups_beyond_the_window_and_no_fewer(group, window, length):
    schedule = Schedule(group, window)
    quantized = schedule.quantized_until(length)
    assert quantized % group == 0
    assert 0 <= quantized <= max(0, length - window) < quantized + group
    assert quantized <= schedule.quantized_until(length + 1)


def test_a_window_and_incomplete_groups_keep_their_bits():
    kv, x = KVQuantizer(BLOCKS, INT4, window=3), torch.randn(2, 2, 13, 16)
    keys, values = kv.keys(x, 0), kv.values(x, 0)
    assert torch.equal(keys[..., 8:, :], x[..., 8:, :])
    assert torch.equal(keys[..., :8, :], BLOCKS(x[..., :8, :]))
    assert torch.equal(values[..., 10:, :], x[..., 10:, :])
    assert torch.equal(values[..., :10, :], INT4(x[..., :10, :]))


def test_what_was_quantized_before_is_not_quantized_again():
    kv, x = KVQuantizer(INT4, INT4), torch.randn(1, 2, 6, 16)
    keys = kv.keys(x, 4)
    assert torch.equal(keys[..., :4, :], x[..., :4, :])
    assert torch.equal(keys[..., 4:, :], INT4(x[..., 4:, :]))


def test_full_precision_keys_beside_quantized_values():
    kv, x = KVQuantizer(nn.Identity(), INT4), torch.randn(1, 2, 6, 16)
    assert torch.equal(kv.keys(x, 0), x)
    assert not torch.equal(kv.values(x, 0), x)
    assert kv.is_immediate


@pytest.mark.parametrize("window", [-1, 2.5, None])
def test_a_window_is_a_number_of_tokens(window):
    with pytest.raises(InputError, match="is a number of tokens"):
        partial(KVQuantizer, INT4, INT4)(window)
