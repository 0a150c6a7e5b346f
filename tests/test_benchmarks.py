"""The accuracy benchmarks run to their end, on a toy."""

import math
import sys
from functools import partial

import pytest
import torch
from torch import nn

import qat
from benchmarks import (
    decode,
    fake_quantize,
    grids,
    kv_cache,
    loss,
    loss_curve,
    low_bit_step,
    mixed,
    pruning,
    recipe,
    tables,
    train_step,
)
from qat.numerics.granularity import parse_granularity
from qat.planning import integers, planned_layers, storage
from qat.quantizers import MinMaxQuantizer
from tests.conftest import tiny_llama


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Rows by the name of the result; models, texts and the place of results are replaced."""
    found = {}

    def load(weights=None):
        torch.manual_seed(0)
        model = tiny_llama(head_dim=32)
        if weights is not None:
            model.load_state_dict(weights)
        return model.to(recipe.device())

    def windows(folder, length):
        return tuple(torch.randint(64, (12, 32), generator=torch.Generator().manual_seed(i)) for i in range(2))

    monkeypatch.setenv("QAT_COMMIT", "toy")
    for module in (grids, kv_cache, loss_curve, mixed, pruning):
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(module, "windows", windows)
        monkeypatch.setattr(module, "record", lambda name, command, rows, *_: found.update({name: rows}))
    monkeypatch.chdir(tmp_path)
    return found


def run(monkeypatch, module, *arguments, steps=("--steps", "3")):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--texts", ".", *steps, *arguments])
    module.main()


def test_the_table_of_kernels_has_the_worst_and_the_best_of_all_shapes():
    shapes = {(4096, 4096): (0.9, 1.5), (576, 1536): (0.3, 0.8), (8192, 8192): (0.95, 1.2)}
    kernel = {"format": "int4", "granularity": "per_channel", "direction": "forward"}
    rows = [
        kernel | {"shape": list(shape), "us": 10.0, "copy_share": share, "peer_us": 10 * peer}
        for shape, (share, peer) in shapes.items()
    ]
    table = tables.fake_quantize([*rows, rows[0] | {"direction": "backward"}]).splitlines()
    best = "95% (8192 x 8192) | 0.80x (576 x 1536) | 1.50x (4096 x 4096) |"
    assert table[2] == f"| int4 | per_channel | forward | 30% (576 x 1536) | {best}"
    assert table[3] == "| int4 | per_channel | backward | 90% | 90% | 1.50x | 1.50x |"
    assert table[-1] == "Matrices: 4096 x 4096, 576 x 1536, 8192 x 8192."


def test_kernels_are_measured_at_sizes_that_launches_bound_too():
    assert {(576, 1536), (2048, 512)} < set(fake_quantize.SHAPES)
    for _, spelling, *_ in (*fake_quantize.STATIC, *fake_quantize.DYNAMIC):
        for shape in fake_quantize.SHAPES:
            assert parse_granularity(spelling).view(torch.empty(shape, device="meta")).numel() == math.prod(shape)


def test_grids(results, monkeypatch):
    names = ["int4-g64", "kmeans3-row", "vector2-row", "mxfp4-g32"]
    run(monkeypatch, grids, "--grids", *names)
    first = results.pop("grids")
    assert [row["grid"] for row in first] == [*["fp"] * 3, *["int4-g64"] * 3, *names[1:]]
    fp, quantized = first[:3], first[3:]
    assert len({row["ppl_fp"] for row in fp}) == 3  # rates matter
    assert {row["ppl_fp"] for row in quantized} == {min(row["ppl_fp"] for row in fp)}
    assert all(row["ppl_rtn"] != row["ppl_qat"] for row in quantized)
    run(monkeypatch, grids, "--grids", *names)
    assert results["grids"] == first  # nothing was trained again


def test_the_learning_rate_follows_from_the_bits():
    rates = {grid: [rate for _, rate in grids.arms_of(grid)] for grid in grids.GRIDS}
    assert rates["ternary"] == rates["kmeans2-row"] == rates["vector2-row"] == [1e-4]
    assert rates["kmeans3-row"] == rates["nf3-g64"] == [5e-5]
    assert rates["kmeans4-row"] == rates["nf4-g64"] == rates["int8-row"] == [2e-5]
    assert rates["int4-g64"] == [2e-5, 5e-5, 1e-4]


def test_kv_cache(results, monkeypatch):
    run(monkeypatch, kv_cache, "--tokens", "64")
    rows = results["kv_cache"]
    ppl = {(row["scheme"], row["arm"]): row["ppl"] for row in rows if "ppl" in row}
    assert len({ppl["w4a8kv4", arm] for arm in ("rounded", "trained", "trained without the cache")}) == 3
    assert ppl["kv8", "rounded"] == pytest.approx(ppl["fp", "trained"], rel=1e-2)
    sizes = {row["scheme"]: row["cache_gib"] for row in rows if row["arm"] == "memory"}
    assert sizes["kv2"] < sizes["kv4"] < sizes["kv8"]


def test_pruning(results, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--texts", ".", "--calibration", "4"])
    pruning.main()
    rows = {(row["arm"], row["pattern"], row["scheme"]): row for row in results["pruning"]}
    assert list(rows) == pruning.ARMS
    dense = rows["dense", "dense", "fp"]
    assert all(row["ppl_fp"] == dense["ppl"] for row in rows.values())
    assert {row["sparsity"] for row in rows.values() if row["pattern"] in pruning.PATTERNS} == {0.5}
    for (arm, _, scheme), row in rows.items():
        assert row["seconds_per_token"] > 0
        if arm.startswith("structured"):
            assert 0.25 < row["sparsity"] < 0.6
            assert row["mib"] < 0.9 * rows["dense", "dense", scheme]["mib"]
        if scheme != "fp":
            assert row["bits_per_weight"] == 4.25
            assert row["mib"] < dense["mib"]
    assert rows["sparsegpt", "2:4", "int4-g64"]["density"] <= 0.5


def test_mixed(results, monkeypatch):
    arguments = ["--signals", "kl", "entropy", "--methods", "rtn", "gptq", "--draws", "2"]
    run(monkeypatch, mixed, *arguments, steps=())
    first = results.pop("mixed")
    keys = [(row["bits_per_weight"], row["signal"], row["method"]) for row in first]
    assert keys == [(b, s, m) for m in ("rtn", "gptq") for s in ("kl", "entropy") for b in (3.25, 3.5)]
    for row in first:
        assert row["planned_bits_per_weight"] <= row["bits_per_weight"] + 1e-9
        assert sum(row["layers"].values()) == 14
        assert len(row["ppl_random_draws"]) == 2
        assert min(row[key] for key in ("ppl_uniform", "ppl_random", "ppl_mixed", "ppl_fp")) > 1
    assert first[0]["ppl_uniform"] == first[2]["ppl_uniform"] != first[4]["ppl_uniform"]
    monkeypatch.setattr(mixed, "perplexity", None)
    run(monkeypatch, mixed, *arguments, steps=())
    assert results["mixed"] == first  # nothing was measured again


def test_mixed_for_gptq(results, monkeypatch):
    arguments = ["--signals", "kfac", "--methods", "gptq", "--draws", "1"]
    run(monkeypatch, mixed, *arguments, "--roundings", "nearest", "gptq", steps=())
    first = results.pop("mixed")
    keys = [(row["rounding"], row["bits_per_weight"]) for row in first]
    assert keys == [(r, b) for r in ("nearest", "gptq") for b in (3.25, 3.5)]
    assert all(row["plan_seconds"] > 0 for row in first)
    assert first[0]["plan_seconds"] != first[2]["plan_seconds"]
    monkeypatch.setattr(mixed, "perplexity", None)
    run(monkeypatch, mixed, *arguments, "--roundings", "gptq", steps=())
    assert results["mixed"] == first[2:]  # nothing was measured again


def test_bits_drawn_at_random_spend_the_budget():
    layers = planned_layers(tiny_llama())
    bits = storage(layers, integers())
    for seed in range(3):
        assignment = mixed.drawn(tiny_llama(), integers(), 3.5, seed)
        spent = sum(bits[layer][name] for layer, name in assignment.items())
        share = spent / sum(layer.weights for layer in layers.values())
        assert 3.4 < share <= 3.5
        assert len(set(assignment.values())) > 2


@pytest.mark.parametrize("made", [loss.arms, loss.taught])
def test_loss(made):
    rows = {row["arm"]: row for row in loss.compare("tiny", loss.SHAPES["tiny"], 2, "cpu", made)}
    assert rows["plain"]["speed_ratio"] == 1
    assert rows["chunked"]["gradient_error"] < 1e-5
    assert rows["chunked"]["ms"] > 0


def test_decode(monkeypatch):
    monkeypatch.setattr(decode, "_STEPS", 2)
    found = {format: decode.measure("toy", format, [8]) for format in (decode.BF16, "int4-g64")}
    (row,) = decode.rows_of("toy", "int4-g64", found["bf16"], found["int4-g64"])
    assert row["rel_error"] < 1e-2
    assert row["weights_gib"] < row["bf16_weights_gib"] / 2
    assert tables.decode([row]).splitlines()[2].startswith("| toy | int4-g64 | 8 | ")


def test_weights_in_the_order_of_kernels_are_counted():
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    scheme = qat.Scheme(weight=partial(MinMaxQuantizer, bits=4, granularity="per_group_64"), kv=None, head=True)
    qat.convert(qat.prepare(model, scheme))
    rows = decode.bytes_of(model)
    assert rows >= 256 * 256 / 2
    assert model[0].weight.tiled() is not None
    assert rows <= decode.bytes_of(model) <= rows + 3 * 2 * 1024


def test_the_loss_curve_of_kernels(monkeypatch):
    """On a CPU, where the kernels are the references; a difference is refused."""
    monkeypatch.setattr(loss_curve, "curve", lambda *_, **__: torch.tensor([3.0, 2.0]))
    row = loss_curve.compare("w4a8-minmax", torch.float32, torch.zeros(1, 1), 2)
    assert (row["mean"], row["again"], row["dtype"]) == (0, 0, "float32")
    assert tables.loss_curve([row]).endswith("| w4a8-minmax | float32 | 2 | 2.500 | 0 | 0 | 0 |")
    assert not torch.are_deterministic_algorithms_enabled()

    curves = iter([2.0, 2.1])
    monkeypatch.setattr(loss_curve, "curve", lambda *_, **__: torch.tensor([next(curves)]))
    with pytest.raises(SystemExit, match=r"w4a8-minmax differ by 0[.]1 from"):
        loss_curve.compare("w4a8-minmax", torch.float32, torch.zeros(1, 1), 1)


def test_low_bit_step(monkeypatch, capsys):
    monkeypatch.setattr(low_bit_step, "record", None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--tiny"])
    low_bit_step.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 2 * (7 + 1)
    assert all("'us': " in line for line in lines)


def test_products_of_codes_train_as_fake_quantization(results, monkeypatch):
    run(monkeypatch, loss_curve, "--products")
    rows = results["loss_products"]
    assert [row["scheme"] for row in rows] == [
        f"w8a8 {kind}, {products}" for kind in ("int8", "fp8") for products in ("forward", "all three")
    ]
    assert all(row["steps"] == 3 and row["mean"] < row["noise"] for row in rows)
    assert tables.loss_products(rows).count("\n") == 5


@pytest.mark.parametrize("arm", train_step.W4A8_ALONE)
def test_a_frugal_step(arm):
    assert train_step.measure(arm, "eager", "toy-frugal", 1)["tokens_per_s"] > 0
