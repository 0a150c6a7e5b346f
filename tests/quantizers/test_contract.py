"""The contract of DESIGN: what holds for every file of configs/quantizer/, so a new quantizer is tested by its yaml."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qat.nn import PackedTensor
from qat.numerics.functional import fake_quantize
from qat.numerics.granularity import PerBlock, PerGroup
from qat.numerics.packing import pack, unpack
from qat.quantizers import NoQuantizer

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "quantizer").glob("*.yaml"))
SHAPE = (32, 192)


def make(path, shape=SHAPE, **overrides):
    return instantiate(OmegaConf.merge(OmegaConf.load(path), overrides))(shape=shape)


def quantizers():
    for path in CONFIGS:
        if not isinstance(make(path), NoQuantizer):
            yield pytest.param(path, id=path.stem)


@pytest.fixture(params=list(quantizers()))
def path(request):
    return request.param


def ready(path, x, **overrides):
    quantizer = make(path, x.shape, **overrides)
    quantizer.initialize(x)
    return quantizer


def same_draw(*calls):
    """Call each after the same seed: stochastic quantizers then draw the same numbers."""
    return [(torch.manual_seed(0), call())[1] for call in calls]


def inputs():
    normal = torch.randn(SHAPE)
    outliers = normal.clone()
    outliers[0, 0] = 1e4
    return {
        "normal": normal,
        "zeros": torch.zeros(SHAPE),
        "constant": torch.full(SHAPE, 0.3),
        "outliers": outliers,
        "tiny": normal * 1e-20,
        "positive": normal.abs() + 1,
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
    }


@pytest.mark.parametrize("kind", inputs())
def test_what_trains_is_what_ships(path, kind):
    """Fake-quantized, quantized, packed and reloaded values are the same bits, finite, and few."""
    x = inputs()[kind]
    quantizer = ready(path, x)
    x_hat, q = same_draw(lambda: quantizer(x), lambda: quantizer.quantize(x))
    packed = PackedTensor.from_quantized(q)
    reloaded = PackedTensor(packed.description)
    reloaded.load_state_dict(packed.state_dict())
    assert x_hat.dtype == x.dtype
    assert torch.isfinite(x_hat).all()
    assert torch.equal(q.dequantize(), x_hat)
    assert torch.equal(reloaded.dequantize(), x_hat)
    assert q.codes.unique().numel() <= 2**q.format.bits


def test_idempotent_with_frozen_qparams(path):
    x = torch.randn(SHAPE)
    quantizer = ready(path, x)
    qparams = quantizer.qparams(x)
    once = fake_quantize(x, qparams, quantizer.format, quantizer.granularity)
    assert torch.equal(fake_quantize(once, qparams, quantizer.format, quantizer.granularity), once)


def test_qparams_are_stored_exactly(path):
    x = torch.randn(SHAPE)
    quantizer = ready(path, x)
    qparams = quantizer.qparams(x)
    for before, after in zip(qparams.for_view(), quantizer.to_storage(qparams).for_view(), strict=True):
        assert before is None or torch.equal(before, after)


def test_parameters_exist_first_and_keep_their_shape(path):
    quantizer = make(path)
    before = {name: (p.shape, id(p)) for name, p in quantizer.named_parameters()}
    quantizer.initialize(torch.randn(SHAPE))
    assert {name: (p.shape, id(p)) for name, p in quantizer.named_parameters()} == before


def test_state_dict_round_trip(path):
    x = torch.randn(SHAPE)
    quantizer, fresh = ready(path, x), make(path)
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.initialized
    assert torch.equal(*same_draw(lambda: fresh(x), lambda: quantizer(x)))


def test_every_learned_parameter_gets_a_gradient(path):
    x = torch.randn(SHAPE)
    quantizer = ready(path, x)
    wide = (2 * torch.randn(SHAPE)).requires_grad_()
    (quantizer(wide) * torch.randn(SHAPE)).sum().backward()
    assert wide.grad.abs().sum() > 0
    for name, parameter in quantizer.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.flatten(0, -1).abs().sum() > 0, name


def test_pack_then_unpack_for_odd_sizes(path):
    quantizer = make(path)
    kinds = {PerGroup: (5, 192), PerBlock: (32, 7)}
    shape = kinds.get(type(quantizer.granularity), (5, 7 * quantizer.format.block))
    q = ready(path, torch.randn(shape)).quantize(torch.randn(shape))
    assert torch.equal(unpack(pack(q.codes, q.format), q.format, q.codes.shape), q.codes)


def test_casting_the_model_leaves_qparams_in_float32(path):
    quantizer = ready(path, torch.randn(SHAPE)).to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in quantizer.parameters())


def test_the_fused_gradients_are_those_of_the_definition(path):
    x = (1.5 * torch.randn(SHAPE)).requires_grad_()
    quantizer = ready(path, x.detach() / 1.5)
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    g = torch.randn(SHAPE)
    fused = torch.autograd.grad(quantizer(x), [x, *learned], g)
    if quantizer.stochastic:  # straight through, and nothing is learned
        assert torch.equal(fused[0], g)
        return
    definition = fake_quantize(x, quantizer.qparams(x), quantizer.format, quantizer.granularity)
    expected = torch.autograd.grad(definition, [x, *learned], g)
    for a, b in zip(fused, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_per_token_quantizer_serves_any_number_of_tokens():
    for path in CONFIGS:
        if OmegaConf.load(path).get("granularity") == "per_token":
            assert make(path, (192,))(torch.randn(2, 7, 192)).shape == (2, 7, 192)
