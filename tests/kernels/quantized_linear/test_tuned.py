"""Launches that a user's GPU was tuned to: how they are found, kept and chosen."""

import json

import pytest
import torch

from qat.errors import InputError
from qat.kernels.quantized_linear import ops, tuned, tuning
from qat.kernels.quantized_linear.choice import SHARED_BYTES, choice, rule, shared_bytes
from qat.kernels.quantized_linear.launches import Dequantize, Ring, Skinny, Wide, key_of
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.weight import tiled
from tests.kernels.quantized_linear.weights import KINDS, quantized, weight_like

GPU = "NVIDIA GeForce RTX 4090/D"
LAYOUT = Layout(4096, 4096, 4, center=8, group=64)
LAUNCHES = ((1, Skinny(8, 4)), (16, Ring(2, 1, 255, 3)), (64, Wide(128, 64, 2)), (256, Dequantize()))


def test_what_was_tuned_is_chosen_on_that_gpu():
    own = weight_like(LAYOUT)
    tuned.save(GPU, key_of(own), LAUNCHES)
    other = weight_like(LAYOUT._replace(columns=14336))
    tuned.save(GPU, key_of(other), LAUNCHES[:1])
    assert tuned.tuned_on(GPU) == {key_of(own): LAUNCHES, key_of(other): LAUNCHES[:1]}
    assert [choice(own, count, GPU) for count in (1, 5, 17, 200)] == [how for _, how in LAUNCHES]
    # Nothing near was tried, another GPU, other groups, zero points.
    assert [choice(own, count, GPU) for count in (2, 257)] == [rule(LAYOUT, count) for count in (2, 257)]
    assert choice(own, 1, "NVIDIA A100") == rule(LAYOUT, 1)
    for layout in (LAYOUT._replace(group=128), LAYOUT._replace(center=None)):
        assert choice(weight_like(layout), 1, GPU) == rule(layout, 1)


def test_tuning_for_other_tokens_keeps_what_was_found():
    own = weight_like(LAYOUT)
    tuned.save(GPU, key_of(own), LAUNCHES[:2])
    tuned.save(GPU, key_of(own), ((512, Dequantize()), (16, Skinny())))
    assert tuned.tuned_on(GPU)[key_of(own)] == (LAUNCHES[0], (16, Skinny()), (512, Dequantize()))
    assert choice(own, 1, GPU) == LAUNCHES[0][1]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[1]", '[{"rows": 1}]', '[{"launches": [{"tokens": 1, "kernel": "Fast"}]}]'),
        '[{"launches": [{"tokens": "1", "kernel": "Dequantize"}]}]',
    ],
)
def test_a_damaged_file_gives_way_to_the_rule(content, caplog):
    path = tuned.path_for(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    for _ in range(2):
        assert choice(weight_like(LAYOUT), 1, GPU) == rule(LAYOUT, 1)
    (record,) = caplog.records
    assert "tune again with qat-tune" in record.message
    tuned.save(GPU, key_of(weight_like(LAYOUT)), LAUNCHES)
    assert choice(weight_like(LAYOUT), 1, GPU) == LAUNCHES[0][1]


def test_the_file_can_be_read():
    tuned.save(GPU, key_of(weight_like(LAYOUT)), LAUNCHES[:1])
    (entry,) = json.loads(tuned.path_for(GPU).read_text())
    assert (entry["rows"], entry["kind"], entry["group"]) == (4096, "integers", 64)
    assert entry["launches"] == [
        {"tokens": 1, "kernel": "Skinny", "warps": 8, "warps_k": 4, "registers": 168, "ahead_x": False}
    ]


def test_the_fastest_that_is_right_comes_first(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources

    weight = tiled(quantized(KINDS[0], (16, 128)))

    def product(how, x, weight, words, bias=None):
        if how.registers == 255:
            raise OutOfResources(300000, 232448, "shared memory")
        y = ops.quantized_linear(x.float(), weight)
        return y * 2 if how.warps == 8 else y

    monkeypatch.setattr(ops, "product_by", product)
    monkeypatch.setattr(tuning, "copies", lambda weight, dtype: [(weight,)])
    monkeypatch.setattr(tuning, "microseconds", lambda call, sets: call(*sets[0]).numel() + len(times))
    times = []
    found = tuning.fastest_first(weight, 3, torch.float32)
    assert {how.warps for how, _ in found} == {1, 2, 4}
    assert {how.registers for how, _ in found} == {96, 128, 168}
    assert [us for _, us in found] == sorted(us for _, us in found)
    monkeypatch.setattr(tuning, "candidates", lambda weight, tokens: [Skinny(8)])
    with pytest.raises(InputError, match="No kernel multiplies 3 tokens"):
        tuning.fastest_first(weight, 3, torch.float32)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 200, 2048])
def test_candidates_fit_the_tokens(tokens):
    found = list(tuning.candidates(weight_like(LAYOUT), tokens))
    assert len(set(found)) == len(found) > 3
    wide = [how for how in found if isinstance(how, Wide)]
    assert bool(wide) == (tokens > 8)
    assert all(how.tokens < 2 * tokens or how.tokens == 16 or tokens > 128 for how in wide)
    assert (Dequantize() in found) == (tokens >= 64)
    assert all(shared_bytes(LAYOUT, how) <= SHARED_BYTES for how in wide)
