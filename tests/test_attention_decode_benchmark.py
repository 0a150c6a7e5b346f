"""The benchmark of attention to a quantized cache, as far as a CPU goes."""

import pytest
import torch

from benchmarks import attention_decode as benchmark
from qat.kernels.attention_decode.cached import takes
from qat.kernels.attention_decode.ops import attention_decode
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity


@pytest.mark.parametrize("name", benchmark.LAYOUTS)
def test_what_is_compared_agrees(name):
    q, (keys, values) = benchmark.query(2, "cpu"), benchmark.cache(name, 2, 200, "cpu")
    assert keys.length == values.length == 200
    for own in (keys, values):
        assert takes(parse_format(own.format), parse_granularity(own.granularity), benchmark.DIM)
        assert 0.5 < own.values(0, 200, torch.float32).std() < 2
    assert benchmark.agreed(q, keys, values, name) < benchmark.GATE
    wrong = attention_decode(q, values, keys)
    assert benchmark.error_of(wrong, q, keys, values) > 0.1


def test_bytes_are_those_of_codes_scales_and_zero_points():
    assert benchmark.bytes_of(*benchmark.cache("kv4", 1, 1024, "cpu")) == 2 * 8 * 1024 * (64 + 2 + 1)
    assert benchmark.dense_bytes(1, 1024) == 2 * 8 * 1024 * 128 * 2


def test_both_ways_to_attend_in_bf16_are_the_same():
    q = benchmark.query(2, "cpu")
    k, v = (torch.randn(2, benchmark.KV_HEADS, 50, benchmark.DIM).bfloat16() for _ in range(2))
    first, second = (attend(k, v) for attend in benchmark.dense_ways(q).values())
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2)


def test_rows_so_far_are_kept(tmp_path):
    work = tmp_path / "rows.jsonl"
    assert list(benchmark.rows_so_far(work)) == []
    work.write_text('{"layout": "kv4", "batch": 1, "tokens": 1024}\n')
    benchmark.measure(["kv4"], 1, 1024, work)  # would need a GPU
    assert len(list(benchmark.rows_so_far(work))) == 1


def test_launches_to_try_differ():
    pytest.importorskip("triton")
    assert len(set(benchmark.candidates())) == len(list(benchmark.candidates()))
