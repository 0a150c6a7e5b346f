"""Learnable codebooks: how they start, follow their weights, and soften."""

import pytest
import torch

from qat.errors import InputError
from qat.numerics.metrics import code_entropy, sqnr
from qat.quantizers import KMeansQuantizer, MinMaxQuantizer


def fitted(x, importance=None, **options):
    quantizer = KMeansQuantizer(x.shape, **options)
    quantizer.initialize(x, importance)
    return quantizer


def error(quantizer, x, importance=1.0):
    return (importance * (quantizer(x) - x).square()).sum().item()


@pytest.mark.parametrize("options", [{}, {"codebook": "per_tensor"}, {"granularity": "per_group_32"}], ids=str)
def test_importance_lowers_the_error_that_counts(options):
    x, importance = torch.randn(8, 256), torch.randn(8, 256).pow(4)
    plain, weighted = fitted(x, bits=3, **options), fitted(x, importance, bits=3, **options)
    assert error(weighted, x, importance) < 0.95 * error(plain, x, importance)
    assert error(weighted, x) > error(plain, x)


def test_importance_makes_no_difference_to_scales_that_bound_all():
    x = torch.randn(4, 64)
    quantizer = MinMaxQuantizer((4, 64), dynamic=False)
    quantizer.initialize(x, torch.rand(4, 64))
    assert torch.allclose(quantizer.scale, x.abs().amax(1, keepdim=True) / 127, rtol=0.01)


def test_importance_of_another_shape_is_refused():
    with pytest.raises(InputError, match="does not match"):
        fitted(torch.randn(4, 64), torch.rand(4, 32))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor", "per_group_64", "per_block_4x32"])
def test_refreshing_follows_the_weights(granularity):
    """After the weights have moved away, steps of k-means come close to a new fit."""
    x = torch.randn(16, 256)
    quantizer = fitted(x, bits=3, granularity=granularity)
    moved = 0.6 * x + 0.3 * torch.rand(16, 256)
    errors = [error(quantizer, moved)]
    for _ in range(25):
        quantizer.refresh(moved)
        errors.append(error(quantizer, moved))
    assert errors[0] > errors[1] > 0.999 * errors[2] > 0.99 * errors[-1]
    assert errors[-1] < 0.75 * errors[0]
    # Lloyd's algorithm ends at a local optimum; a new fit starts near the global one.
    assert errors[-1] < 1.2 * error(fitted(moved, bits=3, granularity=granularity), moved)


def test_refreshing_a_fit_changes_next_to_nothing():
    x = torch.randn(16, 256)
    quantizer = fitted(x, bits=3)
    before = quantizer.codebook.detach().clone()
    quantizer.refresh(x)
    assert torch.allclose(quantizer.codebook, before, atol=0.02)


def test_refreshing_keeps_entries_in_their_places():
    """The optimizer's state belongs to places: an entry that crossed another one keeps its own."""
    x = torch.randn(4, 256)
    quantizer = fitted(x, bits=2)
    with torch.no_grad():
        quantizer.codebook.copy_(quantizer.codebook.flip(-1))
    quantizer.refresh(x)
    assert (quantizer.codebook.diff(dim=-1) < 0).all()


def test_refreshing_revives_dead_entries():
    x = torch.randn(8, 512)
    quantizer = fitted(x, bits=3)
    with torch.no_grad():
        quantizer.codebook[..., :4] = 7.0  # beyond every weight
    assert code_entropy(quantizer.quantize(x)).max() <= 2
    quantizer.refresh(x)
    assert code_entropy(quantizer.quantize(x)).min() > 2.2


def test_refreshing_weighs_by_importance():
    x, importance = torch.randn(8, 256), torch.randn(8, 256).pow(4)
    plain, weighted = fitted(x, bits=2), fitted(x, bits=2)
    for _ in range(10):
        plain.refresh(x)
        weighted.refresh(x, importance)
    assert error(weighted, x, importance) < error(plain, x, importance)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_entropy_initialisation_uses_all_codes_alike(bits):
    x = torch.randn(8, 1024)
    entropy = code_entropy(fitted(x, bits=bits, init="entropy", scale_dtype="float32").quantize(x))
    assert entropy.min() > bits - 0.01
    assert (code_entropy(fitted(x, bits=bits).quantize(x)) < entropy).all()


def test_soft_assignment_is_for_training_only():
    x = torch.randn(8, 64)
    hard, soft = fitted(x, bits=3), fitted(x, bits=3, temperature=0.05)
    assert not torch.equal(soft(x), hard(x))
    assert torch.equal(soft.quantize(x).dequantize(), hard(x))
    assert torch.equal(soft.eval()(x), hard(x))


def test_soft_assignment_mixes_by_distance():
    """The scaled mixture, in the layer as well as alone, with gradients to weights, scales and codebook."""
    x = torch.randn(8, 64)
    quantizer = fitted(x, bits=2, temperature=0.05, codebook="per_tensor", learn_scale=True)
    scale, _, codebook, _ = quantizer.qparams(x).for_view()
    shares = (-(x / scale).unsqueeze(2).sub(codebook[0]).square() / 0.05).softmax(2)
    assert torch.allclose(quantizer(x), (shares @ codebook[0]) * scale, atol=1e-5)
    weight, tokens = x.clone().requires_grad_(), torch.randn(3, 64)
    y = quantizer.linear(tokens, weight, None)
    assert torch.allclose(y, tokens @ quantizer(weight).T, atol=1e-5)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (weight, quantizer.codebook, quantizer.log_scale))


def test_a_temperature_is_positive():
    with pytest.raises(InputError, match="temperature is 0; it is positive, or null"):
        KMeansQuantizer((4, 64), temperature=0)


def test_a_codebook_for_a_large_tensor_is_the_optimum_of_its_bf16_values():
    x = torch.randn(300, 256).bfloat16()
    assert sqnr(x, fitted(x, bits=4, granularity="per_tensor")(x)) > 20.15  # of the best 16 levels: 20.22 dB


@pytest.mark.parametrize("granularity", ["per_channel", "per_group_32"])
def test_entries_are_integers_in_training_too(granularity):
    x = torch.randn(8, 64)
    quantizer = fitted(x, bits=3, granularity=granularity, entry_bits=7)
    free = fitted(x, bits=3, granularity=granularity)
    entries = quantizer.qparams(x).codebook
    assert torch.equal(entries * 64, (entries * 64).round())
    assert -1 <= entries.min() < entries.max() <= 63 / 64
    assert error(quantizer, x) < 1.05 * error(free, x)

    quantizer(x).square().sum().backward()
    free(x).square().sum().backward()
    assert quantizer.codebook.grad.norm() > 0
    assert torch.allclose(
        quantizer.codebook.grad, free.codebook.grad, rtol=0.1, atol=0.1 * float(free.codebook.grad.abs().max())
    )


def test_pruned_weights_are_zero_among_integers():
    x = torch.randn(4, 64)
    quantizer = fitted(x, bits=3, entry_bits=5)
    mask = torch.rand(4, 64) > 0.5
    quantizer.mask = mask
    assert (quantizer(x)[~mask] == 0).all()


@pytest.mark.parametrize("bits", [1, 9])
def test_entries_of_no_such_bits_are_refused(bits):
    with pytest.raises(InputError, match=f"2 to 8 bits, not entry_bits={bits}"):
        KMeansQuantizer((4, 64), entry_bits=bits)
