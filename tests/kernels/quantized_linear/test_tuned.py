"""Launches that a user's GPU was tuned to: how they are found, kept and chosen."""

import json

import pytest
import torch

from qat.errors import InputError
from qat.kernels.quantized_linear import ops, tuned, tuning
from qat.kernels.quantized_linear.choice import choice, rule
from qat.kernels.quantized_linear.launches import Dequantize, Ring, Skinny, Wide, key_of
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.weight import tiled
from tests.kernels.quantized_linear.weights import KINDS, quantized

GPU = "NVIDIA GeForce RTX 4090/D"
LAYOUT = Layout(4096, 4096, 4, center=8, group=64)
LAUNCHES = ((1, Skinny(8, 4)), (16, Ring(2, 1, 255, 3)), (64, Wide(128, 64, 2)), (256, Dequantize()))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    tuned.tuned_on.cache_clear()
    yield tmp_path
    tuned.tuned_on.cache_clear()


def test_what_was_tuned_is_chosen_on_that_gpu():
    tuned.save(GPU, key_of(LAYOUT), LAUNCHES)
    other = LAYOUT._replace(columns=14336)
    tuned.save(GPU, key_of(other), LAUNCHES[:1])
    assert tuned.tuned_on(GPU) == {key_of(LAYOUT): LAUNCHES, key_of(other): LAUNCHES[:1]}
    assert [choice(LAYOUT, count, GPU) for count in (1, 2, 17, 200)] == [how for _, how in LAUNCHES]
    assert choice(LAYOUT, 257, GPU) == rule(LAYOUT, 257)
    assert choice(LAYOUT, 1, "NVIDIA A100") == rule(LAYOUT, 1)
    assert choice(LAYOUT._replace(group=128), 1, GPU) == rule(LAYOUT._replace(group=128), 1)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"rows": 1}]', '[{"launches": [{"tokens": 1, "kernel": "Fast"}]}]'])
def test_a_damaged_file_says_its_mend(content):
    path = tuned.path_for(GPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError, match=r"RTX_4090_D[.]json holds no launches .*: delete it"):
        choice(LAYOUT, 1, GPU)


def test_the_file_can_be_read():
    tuned.save(GPU, key_of(LAYOUT), LAUNCHES[:1])
    (entry,) = json.loads(tuned.path_for(GPU).read_text())
    assert (entry["rows"], entry["kind"], entry["group"]) == (4096, "integers", 64)
    assert entry["launches"] == [
        {"tokens": 1, "kernel": "Skinny", "warps": 8, "warps_k": 4, "registers": 168, "ahead_x": False}
    ]


def test_the_fastest_that_is_right_comes_first(monkeypatch):
    weight = tiled(quantized(KINDS[0], (16, 128)))

    def product(how, x, weight, words, bias=None):
        if how.registers == 255:
            raise RuntimeError("out of resource: registers")
        y = ops.quantized_linear(x.float(), weight)
        return y * 2 if how.warps == 8 else y

    monkeypatch.setattr(ops, "product_by", product)
    monkeypatch.setattr(tuning, "copies", lambda weight: [(weight,)])
    monkeypatch.setattr(tuning, "microseconds", lambda call, sets: call(*sets[0]).numel() + len(times))
    times = []
    found = tuning.fastest_first(weight, 3, torch.float32)
    assert {how.warps for how, _ in found} == {1, 2, 4}
    assert {how.registers for how, _ in found} == {96, 128, 168}
    assert [us for _, us in found] == sorted(us for _, us in found)
    monkeypatch.setattr(tuning, "candidates", lambda tokens: [Skinny(8)])
    with pytest.raises(InputError, match="No kernel multiplies 3 tokens"):
        tuning.fastest_first(weight, 3, torch.float32)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 200, 2048])
def test_candidates_fit_the_tokens(tokens):
    found = list(tuning.candidates(tokens))
    assert len(set(found)) == len(found) > 3
    wide = [how for how in found if isinstance(how, Wide)]
    assert bool(wide) == (tokens > 8)
    assert all(how.tokens < 2 * tokens or how.tokens == 16 or tokens > 128 for how in wide)
    assert (Dequantize() in found) == (tokens >= 64)
