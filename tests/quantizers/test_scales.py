"""Scales hold what they scale, random rounding is unbiased, and what no scale holds is refused."""

import pytest
import torch

from qat.errors import InputError
from qat.numerics.metrics import sqnr
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MinMaxQuantizer,
    TableQuantizer,
)


def initialized(quantizer, x):
    quantizer.initialize(x)
    return quantizer


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_within_minmax_scales_is_trained(bits, symmetric, scale_dtype):
    x = torch.randn(64, 256, requires_grad=True)
    quantizer = MinMaxQuantizer(x.shape, bits, None, "per_group_64", symmetric, scale_dtype=scale_dtype)
    quantizer(x).sum().backward()
    assert (x.grad == 1).all()
    stored = quantizer.quantize(x.detach())
    assert torch.equal(stored.dequantize(), quantizer(x))
    assert symmetric or stored.qparams.zero_point.dtype == torch.uint8


UNBIASED = {
    "integers": {"bits": 8},
    "integers in groups": {"bits": 4, "granularity": "per_group_8"},
    "two bits": {"bits": 2},
    "fp8": {"format": "fp8_e5m2"},
    "fp4": {"format": "fp4_e2m1"},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_stochastic_rounding_is_unbiased(name):
    x = torch.randn(8, 64)
    quantizer = MinMaxQuantizer(x.shape, rounding="stochastic", scale_dtype="float32", **UNBIASED[name])
    draws = torch.stack([quantizer(x) for _ in range(2000)])
    error_of_the_mean = (draws.mean(0) - x).square().mean()
    assert 0.7 < error_of_the_mean / (draws.var(0).mean() / 2000) < 1.4
    assert (quantizer.quantize(x).dequantize() - x).square().mean() > 1000 * error_of_the_mean


@pytest.mark.parametrize("options", [{}, {"family": "af"}, {"bits": 3}, {"granularity": "per_token"}], ids=str)
def test_stochastic_codes_of_tables_are_unbiased(options):
    x = torch.randn(8, 64)
    quantizer = TableQuantizer(x.shape, rounding="stochastic", **options)
    draws = torch.stack([quantizer(x) for _ in range(2000)])
    error_of_the_mean = (draws.mean(0) - x).square().mean()
    assert 0.7 < error_of_the_mean / (draws.var(0).mean() / 2000) < 1.4
    assert (TableQuantizer(x.shape, **options)(x) - x).square().mean() > 400 * error_of_the_mean
    leaf = x.clone().requires_grad_()
    quantizer(leaf).sum().backward()
    assert (leaf.grad == 1).all()


@pytest.mark.parametrize("format", ["int4", "fp8_e4m3", "fp4_e2m1", "levels4"])
def test_a_format_brings_its_bits(format):
    x = torch.randn(8, 64)
    quantizer = MinMaxQuantizer(x.shape, format=format)
    assert quantizer.format.name == format
    assert sqnr(x, quantizer(x)) > 5
    assert MinMaxQuantizer(x.shape).format.name == "int8"


def test_strength_blends_in_training_only():
    x = torch.randn(8, 64)
    quantizer = MinMaxQuantizer(x.shape, bits=4)
    full = quantizer(x)
    quantizer.strength = torch.tensor(0.25)
    assert torch.allclose(quantizer(x), 0.75 * x + 0.25 * full)
    quantizer.strength.fill_(0)
    assert torch.equal(quantizer(x), x)
    assert torch.equal(quantizer(x.bfloat16()), x.bfloat16())
    quantizer.strength.fill_(1)
    assert torch.equal(quantizer(x), full)
    quantizer.strength.fill_(0)
    assert torch.equal(quantizer.eval()(x), full)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_no_grid_holds_is_refused(bad):
    x = torch.randn(4, 64)
    x[1, 3] = bad
    for quantizer in (MinMaxQuantizer((4, 64)), TableQuantizer((4, 64)), LSQQuantizer((4, 64))):
        with pytest.raises(InputError, match="NaN or infinity, which no grid holds"):
            quantizer.initialize(x)
        quantizer.initialized = True
        with pytest.raises(InputError, match="NaN or infinity"):
            quantizer.quantize(x)


def test_a_format_brings_its_own_bits():
    assert MinMaxQuantizer((4, 64), format="fp4_e2m1").format.bits == 4
    assert MinMaxQuantizer((4, 64)).format.bits == 8


def grouped_inputs():
    x = torch.randn(64, 256)
    yield x
    yield x.abs()
    yield -x.abs() - 3
    yield x + 1
    yield torch.where(x > 2.5, 100 * x, x)
    yield torch.zeros_like(x)
    yield 1e-40 * x
    yield x.bfloat16()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["per_group_8", "per_group_64", "per_tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_of_minmax_keeps_its_gradient(bits, granularity, symmetric):
    for x in grouped_inputs():
        quantizer = MinMaxQuantizer(x.shape, bits, granularity=granularity, symmetric=symmetric)
        leaf = x.detach().clone().requires_grad_()
        quantizer(leaf).sum().backward()
        assert (leaf.grad == 1).all()
        zero_point = quantizer.qparams(x).zero_point
        if zero_point is not None:
            assert torch.equal(zero_point, zero_point.round())
            assert ((zero_point >= 0) & (zero_point < 2**bits)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: MinMaxQuantizer(shape, 4, granularity="per_group_8", rounding="stochastic"),
        lambda shape: MinMaxQuantizer(shape, 2, granularity="per_token", rounding="stochastic"),
        lambda shape: TableQuantizer(shape, rounding="stochastic"),
        lambda shape: TableQuantizer(shape, "af", rounding="stochastic"),
    ],
    ids=["groups", "tokens", "nf4", "af4"],
)
def test_random_rounding_is_unbiased(make):
    x = torch.randn(16, 64)
    quantizer = make(x.shape)
    draws = torch.stack([quantizer(x) for _ in range(2000)])
    # A draw so rare that it may never happen adds a share of a step that no deviation tells of.
    step = (draws.amax(0) - draws.amin(0)).max()
    assert ((draws.mean(0) - x).abs() < 6 * draws.std(0) / 2000**0.5 + 0.006 * step).all()
    assert (draws[0] - x).abs().max() > 0.05


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_a_percentile_is_what_stays_unclipped(percentile):
    batches = [torch.randn(512, 256) for _ in range(8)]
    quantizer = MinMaxQuantizer(
        (256,), 8, None, "per_tensor", dynamic=False, observer="percentile", percentile=percentile
    )
    observer = quantizer.make_observer()
    for batch in batches:
        observer.update(batch.view(1, -1))
    quantizer.initialize_from(observer.summary())
    limit = quantizer.scale.item() * 127
    unclipped = 100 * (torch.stack(batches).abs() <= limit).float().mean().item()
    assert abs(unclipped - percentile) < 0.3 * (100 - percentile)


def test_observers_of_many_groups_are_bounded():
    observer = MinMaxQuantizer((8,), observer="percentile", dynamic=False, granularity="per_tensor").make_observer()
    observer.update(torch.randn(4096, 2000))
    assert observer.summary().numel() <= 2**20


def test_codebooks_may_serve_several_groups():
    x = torch.randn(8, 256)
    quantizer = initialized(KMeansQuantizer(x.shape, 3, granularity="per_group_32", codebook="per_group_128"), x)
    assert quantizer.codebook.shape == (8, 2, 8)
    assert torch.equal(quantizer(x), quantizer.quantize(x).dequantize())
    own = initialized(KMeansQuantizer((8, 128), 3, granularity="per_group_32", codebook="per_channel"), x[:, 128:])
    assert torch.equal(quantizer(x)[:, 128:], own(x[:, 128:]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinMaxQuantizer((64,), 8, granularity="per_tensor"),
        lambda: initialized(LSQQuantizer((64,), 8, "per_tensor"), torch.randn(64)),
        lambda: TableQuantizer((64,), granularity="per_token"),
    ],
)
def test_no_token_at_all_is_quantized_to_none(make):
    x = torch.zeros(0, 64, requires_grad=True)
    y = make()(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_is_nearer_than_the_extremes_without_data(bits, symmetric):
    x = torch.distributions.StudentT(4.0).sample((64, 256))
    options = {"granularity": "per_group_64", "symmetric": symmetric, "dynamic": False}
    fits = [initialized(MinMaxQuantizer(x.shape, bits, observer=kind, **options), x) for kind in ("minmax", "hqq")]
    extremes, hqq = (sqnr(x, quantizer(x)) for quantizer in fits)
    assert hqq > extremes + 0.1
    assert torch.equal(fits[1].quantize(x).dequantize(), fits[1](x))
