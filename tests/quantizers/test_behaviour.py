"""One behaviour per quantizer: what it is for."""

from functools import partial

import pytest
import torch

from qat.errors import InputError
from qat.numerics.codebooks import NF4, dynamic_map, fixed_codebook, normal_float
from qat.numerics.metrics import sqnr
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
    VectorQuantizer,
)


def error(quantizer, x):
    return (quantizer(x) - x).square().sum().item()


def initialized(quantizer, x):
    quantizer.initialize(x)
    return quantizer


def test_minmax_hits_the_extremes():
    x = torch.randn(8, 64)
    symmetric = MinMaxQuantizer((8, 64), bits=4, scale_dtype="float32")
    largest = x.abs().amax(1)
    assert torch.allclose(symmetric(x).abs().amax(1), largest, rtol=1e-5)
    shifted = x + 5
    asymmetric = MinMaxQuantizer((8, 64), bits=4, symmetric=False)
    assert error(asymmetric, shifted) < error(symmetric, shifted)


def test_zero_is_on_every_grid():
    x = torch.randn(8, 64) + 3
    x[:, 0] = 0
    for quantizer in (
        MinMaxQuantizer((8, 64), symmetric=False, bits=3),
        initialized(LSQQuantizer((8, 64), bits=3, symmetric=False), x),
        TableQuantizer((8, 64)),
    ):
        assert (quantizer(x)[:, 0] == 0).all()


def test_static_minmax_keeps_its_scale_and_refuses_to_guess():
    x = torch.randn(4, 64)
    static = MinMaxQuantizer((64,), dynamic=False, granularity="per_tensor")
    with pytest.raises(InputError, match="never calibrated"):
        static(x)
    static.initialize(x)
    assert static(100 * x).abs().max() <= 1.01 * x.abs().max()


def test_static_per_token_is_refused_with_the_reason():
    with pytest.raises(InputError, match="tokens of later batches"):
        MinMaxQuantizer((64,), dynamic=False, granularity="per_token")


def test_lsq_learns_a_scale_that_lowers_the_error():
    x = torch.randn(16, 64)
    quantizer = initialized(LSQQuantizer((16, 64), bits=3), x)
    with torch.no_grad():
        quantizer.log_scale += 1.0
    start = error(quantizer, x)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert error(quantizer, x) < 0.6 * start


def test_lsq_starts_below_the_error_of_minmax():
    x = torch.randn(64, 64)
    for bits in (2, 3, 4):
        assert error(initialized(LSQQuantizer((64, 64), bits=bits), x), x) < error(
            MinMaxQuantizer((64, 64), bits=bits), x
        )


def test_kmeans_beats_integers_and_nf4_at_equal_bits():
    x = torch.randn(32, 512)
    kmeans = initialized(KMeansQuantizer((32, 512), bits=4), x)
    assert error(kmeans, x) < error(TableQuantizer((32, 512), granularity="per_channel"), x)
    assert error(kmeans, x) < error(MinMaxQuantizer((32, 512), bits=4), x)


def test_kmeans_learns_its_codebook():
    """From NF4, training the codebook alone approaches what k-means finds."""
    x = torch.rand(1, 4096) * 2 - 1
    quantizer = initialized(KMeansQuantizer((1, 4096), bits=4, init="nf4"), x)
    start, best = error(quantizer, x), error(initialized(KMeansQuantizer((1, 4096), bits=4), x), x)
    optimizer = torch.optim.Adam([quantizer.codebook], 0.005)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert start > 1.3 * best
    assert error(quantizer, x) < 1.1 * best


def test_centroids_that_cross_keep_an_ascending_grid():
    quantizer = initialized(KMeansQuantizer((4, 64), bits=2), torch.randn(4, 64))
    with torch.no_grad():
        quantizer.codebook.copy_(quantizer.codebook.flip(-1))
    assert (quantizer.qparams(torch.randn(4, 64)).codebook.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KMeansQuantizer((4, 64), bits=9), "1 to 8 bits"),
        (lambda: KMeansQuantizer((4, 64), bits=3, init="nf4"), "16 entries, not 8: set bits=4"),
        (lambda: KMeansQuantizer((4, 64), entries=300), "2 to 256 entries, not 300"),
        (lambda: KMeansQuantizer((4, 64), init="kmens"), "Did you mean 'kmeans'"),
        (
            lambda: KMeansQuantizer((4, 64), granularity="per_tensor", codebook="per_channel"),
            "not serve whole groups",
        ),
        (lambda: TableQuantizer((4, 64), bits=9), "nf has 2 to 8 bits, not 9"),
        (lambda: TableQuantizer((4, 64), family="af", bits=3), "af has 4 bits, not 3"),
        (lambda: TableQuantizer((4, 64), family="nf5"), "Did you mean 'nf'"),
        (lambda: TableQuantizer((4, 64), rule="minmax"), "rule 'minmax'.* Choose from: absmax, absmean, twn"),
        (lambda: TableQuantizer((4, 64), rule="microscaling"), "Choose from: absmax, absmean, twn"),
        (lambda: TableQuantizer((4, 64), rounding="random"), "no rounding 'random'"),
        (lambda: MinMaxQuantizer((4, 64), bits=4, format="fp8_e4m3"), "fp8_e4m3 has 8 bits, not 4"),
        (lambda: MinMaxQuantizer((4, 64), format="uint4"), "set symmetric=false and bits=4, without format"),
        (lambda: MinMaxQuantizer((4, 64), format="codebook16"), "take KMeansQuantizer or TableQuantizer"),
        (lambda: MinMaxQuantizer((4, 64), format="vector16x2"), "take KMeansQuantizer or TableQuantizer"),
        (lambda: MinMaxQuantizer((4, 64), format="fp8_e4m2"), "Did you mean 'fp8_e"),
        (lambda: MinMaxQuantizer((4, 64), format="fp8_e4m3", symmetric=False), "set symmetric=true"),
        (lambda: MinMaxQuantizer((4, 64), symmetric=False, rounding="stochastic"), "be biased .* set symmetric=true"),
        (lambda: MinMaxQuantizer((4, 64), observer="mean"), "no observer 'mean'"),
        (lambda: MinMaxQuantizer((4, 64), percentile=0.999), "set it to 99.9"),
        (lambda: MinMaxQuantizer((4, 64), rounding="random"), "no rounding 'random'"),
        (lambda: LSQQuantizer((4, 64), bits=3, grid="ternary"), "stored in 2 bits, not 3"),
        (lambda: LSQQuantizer((4, 64), grid="stretched", symmetric=False), "set symmetric=true"),
        (lambda: MicroscalingQuantizer((4, 64), format="int4"), "small floats, not int4"),
        (lambda: MicroscalingQuantizer((4, 64), bits=8), "fp4_e2m1 has 4 bits, not 8"),
        (lambda: NVFP4Quantizer((4, 64), bits=8), "4 bits, not 8"),
        (lambda: NVFP4Quantizer((4, 60)), "group size 16 does not divide 60"),
        (lambda: VectorQuantizer((4, 64), bits=5), "at most 8 bits"),
        (lambda: VectorQuantizer((4, 63), bits=2), "do not divide 63"),
        (lambda: VectorQuantizer((4, 64), bits=2, granularity="per_block_2x2"), "Vector codebooks take"),
        (lambda: MinMaxQuantizer((4, 64), bits=1), "2 to 8 bits"),
        (lambda: TableQuantizer((7, 10), "binary", 1, "per_flat_group_64", "absmean"), "64 does not divide 70"),
        (lambda: TableQuantizer((7, 10), "ternary", 2, "per_flat_group_64", "twn"), "64 does not divide 70"),
        (lambda: LSQQuantizer((7, 10), 2, "per_flat_group_64", grid="stretched"), "64 does not divide 70"),
        (lambda: LSQQuantizer((4, 60), granularity="per_group_64"), "does not divide 60"),
        (lambda: LSQQuantizer((4, 64), scale_dtype="float8"), "scale_dtype"),
    ],
)
def test_bad_options_name_the_mend(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_nf4_equals_bitsandbytes():
    """Codes, scales and values, to the bit."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(96, 576)
    theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=False)
    q = TableQuantizer((96, 576)).quantize(x)
    codes = torch.stack([theirs.view(-1) >> 4, theirs.view(-1) & 15], dim=1).view(-1)
    assert torch.equal(q.codes.view(-1), codes)
    assert torch.equal(q.qparams.scale.view(-1), state.absmax)
    assert torch.equal(q.dequantize(), functional.dequantize_4bit(theirs, state))


def test_double_quantization_is_that_of_bitsandbytes():
    """The same second scales and mean; 8-bit codes that differ at ties only; and no larger error on the weights.

    bitsandbytes picks weight codes for the scale before it is quantized; here they are the nearest on the stored grid.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(96, 576)
    theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    q = TableQuantizer((96, 576), double_quant=True).quantize(x)
    scale = q.qparams.scale
    assert torch.equal(scale.qparams.scale.view(-1), state.state2.absmax)
    assert torch.equal(scale.qparams.offset, state.offset.view(1))
    difference = (scale.codes.view(-1).int() - state.absmax.view(-1).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert sqnr(x, q.dequantize()) >= sqnr(x, functional.dequantize_4bit(theirs, state))


def test_published_tables():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(torch.tensor(dynamic_map()), functional.create_dynamic_map())
    assert tuple(sorted(NF4)) == NF4
    assert len(dynamic_map()) == 256


def test_codebooks_of_any_size():
    quantizer = KMeansQuantizer((8, 64), entries=3)
    x = torch.randn(8, 64)
    quantizer.initialize(x)
    q = quantizer.quantize(x)
    assert quantizer.format.name == "codebook3"
    assert q.codes.unique().tolist() == [0, 1, 2]
    assert torch.equal(quantizer(x), q.dequantize())


@pytest.mark.parametrize("make", [MinMaxQuantizer, LSQQuantizer])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_small_weights_have_scales_in_every_storage_type(make, scale_dtype):
    x = torch.randn(64, 64) * 5e-4
    quantizer = make(x.shape, bits=8, scale_dtype=scale_dtype)
    quantizer.initialize(x)
    assert sqnr(x, quantizer(x)) > 40


@pytest.mark.parametrize("rows", [10, 7])
def test_flat_groups_of_any_size_train(rows):
    quantizer = TableQuantizer((rows, 10), granularity="per_flat_group_64")
    weight = torch.randn(rows, 10, requires_grad=True)
    x = torch.randn(3, 10)
    y = quantizer.linear(x, weight, None)
    assert torch.equal(y, x @ quantizer(weight).T)
    y.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    "make",
    [
        TableQuantizer,
        partial(MinMaxQuantizer, bits=4),
        partial(MinMaxQuantizer, bits=4, symmetric=False),
        partial(LSQQuantizer, bits=3),
        partial(LSQQuantizer, bits=3, symmetric=False),
    ],
    ids=["nf4", "symmetric", "asymmetric", "lsq", "lsq+"],
)
def test_a_short_flat_group_is_quantized_as_if_it_were_alone(make):
    x = torch.randn(7, 10) + 1
    padded = initialized(make(x.shape, granularity="per_flat_group_64"), x)
    short = x.view(-1)[64:].view(1, 6)
    alone = initialized(make(short.shape, granularity="per_channel"), short)
    assert torch.equal(padded(x).view(-1)[64:], alone(short).view(-1))


def test_the_largest_value_sets_the_scale_of_float_grids():
    x = torch.randn(8, 64)
    for format, largest in (("fp8_e4m3", 448), ("fp4_e2m1", 6), ("fp6_e3m2", 28)):
        q = MinMaxQuantizer((8, 64), None, format, scale_dtype="float32").quantize(x)
        assert torch.allclose(q.qparams.scale, x.abs().amax(1, keepdim=True) / largest)


def test_microscaling_follows_the_specification():
    """Power-of-two scales, stored in a byte; elements as torch's own fp8."""
    x = torch.randn(16, 64) * torch.logspace(-6, 6, 16)[:, None]
    q = MicroscalingQuantizer((16, 64), "fp8_e4m3").quantize(x)
    scale = q.qparams.scale.float()
    absmax = x.view(16, 2, 32).abs().amax(2)
    assert q.qparams.scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(scale, torch.exp2(absmax.log2().floor() - 8))
    scaled = (x.view(16, 2, 32) / scale[..., None]).clamp(-448, 448)
    assert torch.equal(q.codes.view(16, 2, 32), scaled.to(torch.float8_e4m3fn).view(torch.uint8))


def test_nvfp4_has_two_levels_of_scales():
    x = torch.randn(16, 64)
    q = NVFP4Quantizer((16, 64)).quantize(x)
    inner = q.qparams.scale
    assert inner.format.name == "fp8_e4m3"
    assert torch.allclose(inner.qparams.scale, x.abs().max() / (6 * 448))
    blocks = inner.codes.view(torch.float8_e4m3fn).float() * inner.qparams.scale
    assert ((blocks - x.view(16, 4, 16).abs().amax(2) / 6).abs() <= blocks / 16).all()
    assert sqnr(x, q.dequantize()) > sqnr(x, MicroscalingQuantizer((16, 64)).quantize(x).dequantize())


def test_ternary_is_that_of_bitnet():
    """BitNet b1.58, equations 1 to 3."""
    x = torch.randn(32, 64)
    gamma = x.abs().mean()
    ternary = TableQuantizer(x.shape, "ternary", 2, "per_tensor", "absmean")
    assert torch.allclose(ternary(x), (x / gamma).round().clamp(-1, 1) * gamma)


def test_ternary_weight_networks_lose_nothing_to_their_threshold():
    x = torch.randn(32, 256)
    delta = 0.7 * x.abs().mean(1, keepdim=True)
    above = x.abs() > delta
    alpha = (x.abs() * above).sum(1, keepdim=True) / above.sum(1, keepdim=True)
    published = alpha * x.sign() * above
    quantizer = TableQuantizer(x.shape, "ternary", 2, "per_channel", "twn")
    assert torch.allclose(quantizer.quantize(x).qparams.scale, alpha)
    assert error(quantizer, x) <= (published - x).square().sum()


def test_binary_has_the_least_squares_scale():
    x = torch.randn(8, 256)
    binary = TableQuantizer(x.shape, "binary", 1, "per_channel", "absmean")
    assert torch.allclose(binary(x), x.sign() * x.abs().mean(1, keepdim=True))


def test_stretched_levels_serve_two_bits_better_than_integers():
    """ParetoQ, section 3.2: at two bits the integers' asymmetry and their zero cost too much; not at four."""
    x = torch.randn(64, 256)

    def start(bits, grid):
        return error(initialized(LSQQuantizer(x.shape, bits, grid=grid), x), x)

    assert start(2, "stretched") < 0.9 * start(2, "integers")
    assert start(2, "stretched") < start(2, "ternary") < start(1, "stretched")


def test_powers_of_two_and_their_sums():
    assert fixed_codebook("pot", 3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    positive = [value for value in fixed_codebook("apot", 4).tolist() if value > 0]
    assert positive == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])


def test_af4_is_the_published_table():
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type("af4", device="cpu", blocksize=64).sort().values
    assert torch.allclose(fixed_codebook("af", 4), theirs, atol=1e-7)


def test_normal_float_of_any_width_has_nf4s_construction():
    assert normal_float.__wrapped__(4) == NF4
    for bits in (2, 3, 5):
        values = normal_float(bits)
        assert len(values) == 2**bits
        assert (values[0], values[2 ** (bits - 1) - 1], values[-1]) == (-1, 0, 1)
        assert tuple(sorted(values)) == values


def test_pairs_beat_single_weights_at_equal_bits():
    x = torch.randn(64, 512)
    pairs = initialized(VectorQuantizer(x.shape, bits=2, granularity="per_tensor"), x)
    singles = initialized(KMeansQuantizer(x.shape, bits=2, granularity="per_tensor"), x)
    assert error(pairs, x) < error(singles, x)
    assert pairs.quantize(x).codes.shape == (64, 256)


def batches():
    """Activations of ten batches, one of them with an outlier."""
    x = torch.randn(10, 64, 32)
    x[4, 0, 0] = 100.0
    return x


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_observer_does_what_it_is_for(symmetric):
    """The extremes cover the outlier; the others clip it, and so represent the rest better."""
    x = batches()
    errors = {}
    for kind in ("minmax", "moving_average", "percentile", "mse"):
        quantizer = MinMaxQuantizer((32,), 4, None, "per_tensor", symmetric, False, kind, scale_dtype="float32")
        observer = quantizer.make_observer()
        for batch in x:
            observer.update(quantizer.granularity.view(batch))
        quantizer.initialize_from(observer.summary())
        quantizer.initialized = True
        highest = float(quantizer(x).max())
        assert highest == pytest.approx(100, rel=0.1) if kind == "minmax" else highest < 60
        errors[kind] = error(quantizer, x[5:])
    assert errors["percentile"] < errors["moving_average"] < errors["minmax"]
    assert errors["mse"] < errors["minmax"]
