"""One behaviour per quantizer: what it is for."""

import pytest
import torch

from qat.errors import InputError
from qat.numerics.codebooks import NF4, dynamic_map
from qat.numerics.metrics import sqnr
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, NF4Quantizer


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
        NF4Quantizer((8, 64)),
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
    assert error(kmeans, x) < error(NF4Quantizer((32, 512), granularity="per_channel"), x)
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
        (lambda: KMeansQuantizer((4, 64), granularity="per_tensor", codebook="per_channel"), "finer than the scales"),
        (lambda: NF4Quantizer((4, 64), bits=3), "NF4 has 4 bits"),
        (lambda: MinMaxQuantizer((4, 64), bits=1), "2 to 8 bits"),
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
    q = NF4Quantizer((96, 576)).quantize(x)
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
    q = NF4Quantizer((96, 576), double_quant=True).quantize(x)
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
    quantizer = NF4Quantizer((rows, 10), granularity="per_flat_group_64")
    weight = torch.randn(rows, 10, requires_grad=True)
    x = torch.randn(3, 10)
    y = quantizer.linear(x, weight, None)
    assert torch.equal(y, x @ quantizer(weight).T)
    y.sum().backward()
    assert weight.grad.shape == weight.shape
