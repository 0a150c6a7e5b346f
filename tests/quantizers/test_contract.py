"""The contract of DESIGN: what holds for every file of configs/quantizer/, so a new quantizer is tested by its yaml."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import qat
from qat.errors import InputError
from qat.nn import PackedTensor
from qat.nn.kv_cache import QuantizedCache
from qat.nn.kv_quantizer import kv_layers
from qat.numerics.functional import fake_quantize
from qat.numerics.granularity import PerBlock, PerGroup
from qat.numerics.packing import pack, unpack
from qat.quantizers import MinMaxQuantizer, NoQuantizer
from qat.transforms import KVCache
from tests.conftest import tiny_llama

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
    if quantizer.stochastic or not quantizer.clips:
        assert torch.equal(fused[0], g)
        assert not learned
        return
    definition = fake_quantize(x, quantizer.qparams(x), quantizer.format, quantizer.granularity)
    expected = torch.autograd.grad(definition, [x, *learned], g)
    for a, b in zip(fused, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# Any yaml may be put in any role: quantizer@scheme.input=nf4, quantizer@scheme.kv.key=lsq, ...
ROLES = ("weight", "input", "output", "grad", "key", "value")
FEATURES = 64


@pytest.fixture(params=ROLES)
def role(request):
    return request.param


def scheme_for(path, role):
    factory = instantiate(OmegaConf.load(path))
    if role in ("key", "value"):
        return qat.Scheme(kv=KVCache(**{role: factory}))
    beside = {"weight": partial(MinMaxQuantizer, granularity="per_channel")} if role in ("input", "output") else {}
    return qat.Scheme(**beside, **{role: factory})


def served(path, role):
    """A tiny model with the quantizer in `role`, calibrated; an InputError if it does not suit it."""
    if role in ("key", "value"):
        one_head = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        model, batch = tiny_llama(hidden_size=FEATURES, **one_head), torch.randint(0, 96, (2, 32))
    else:
        model, batch = nn.Sequential(nn.Linear(FEATURES, FEATURES)), torch.randn(9, FEATURES)
    return qat.calibrate(qat.prepare(model, scheme_for(path, role)), [batch]).eval()


def served_or_refused(path, role):
    """What `served` returns, or None; a refusal must say in a line what to do instead."""
    try:
        return served(path, role)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 250
        assert re.search(rf"\b({role}|{role}s)\b.*\b(take|set|needs)\b", message), message
        return None


def reloaded(stored):
    again = type(stored)(stored.description)
    again.load_state_dict(stored.state_dict())
    return again


def check_layer(model, role, x):
    """The converted layer, and the stored form of the quantizer that was reloaded, compute what trained."""
    quantizer, is_weight = getattr(model[0], f"{role}_quantizer"), role == "weight"
    with torch.no_grad():
        trained, expected = model(x), quantizer(model[0].weight if is_weight else x)
        (packed,) = qat.convert(model)
        stored = reloaded(packed.weight if is_weight else getattr(packed, f"{role}_quantizer"))
        assert torch.equal(stored.dequantize() if is_weight else stored(x), expected)
        assert torch.equal(model(x), trained)


def check_gradient(model, x):
    """Both products of the backward pass see what the quantizer makes of dL/dy; nothing of it ships."""
    (layer,), g = model, torch.randn(len(x), FEATURES)
    x.requires_grad_()
    _, g_hat = same_draw(lambda: layer(x).backward(g), lambda: layer.grad_quantizer(g))
    assert torch.equal(x.grad, g_hat @ layer.weight)
    assert torch.allclose(layer.weight.grad, g_hat.T @ x, atol=1e-5)
    assert not len(x) or not torch.equal(g_hat, g)
    assert type(qat.convert(model)[0]) is nn.Linear


def check_cache(model, role, sizes):
    """However tokens arrive, the cache holds what training sees, to the bit, and the converted model sees the same."""
    (_, _, kv), *_ = kv_layers(model)
    x = torch.randn(2, 1, sum(sizes), FEATURES)
    seen = getattr(kv, f"{role}s")(x, 0)
    assert sum(sizes) < 32 or not torch.equal(seen, x)
    for _ in ("trained", "converted"):
        stored = getattr(QuantizedCache(model).layers[0], f"stored_{role}s")
        for part in x.split(sizes, dim=2):
            stored.append(part)
        assert torch.equal(stored.append(x[..., :0, :]), seen)
        assert torch.equal(getattr(kv, f"{role}s")(x, 0), seen)
        qat.convert(model)


def check(model, role, *sizes):
    if role in ("key", "value"):
        check_cache(model, role, sizes)
    elif role == "grad":
        check_gradient(model, torch.randn(sum(sizes), FEATURES))
    else:
        check_layer(model, role, torch.randn(sum(sizes), FEATURES))


def test_every_role_is_served_as_it_trains_or_refused(path, role):
    model = served_or_refused(path, role)
    if model is not None:
        check(model, role, 33, 0, 1, 36)


def test_every_role_takes_one_token_and_none(path, role):
    for tokens in (1, 0):
        model = served_or_refused(path, role)
        if model is not None:
            check(model, role, tokens)


def test_the_role_in_the_command_of_a_config_is_served(path):
    """So that not everything can be refused."""
    command = path.read_text().splitlines()[0]
    (role,) = re.findall(r"quantizer@scheme\.(?:kv\.)?(\w+)=", command)
    assert served(path, role) is not None
