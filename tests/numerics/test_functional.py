"""The definition of fake quantization: its gradients against closed forms, in float64."""

import pytest
import torch

from qat.numerics.dynamic import absmax_params, minmax_params
from qat.numerics.formats import CodebookFormat, IntFormat
from qat.numerics.functional import fake_quantize, quantize
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.qtensor import QParams
from qat.numerics.ste import round_to_storage, round_up_to_storage, straight_through


def close(actual, expected):
    return torch.allclose(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def test_straight_through_changes_no_bit():
    v, v_hat = torch.randn(1000) * 1e6, torch.randn(1000)
    assert torch.equal(straight_through(v, v_hat), v_hat)


def test_lsq_gradients_match_the_paper():
    """LSQ, equation 3: round(x/s) - x/s inside the grid, its ends outside; LSQ+: the zero point likewise."""
    x = (torch.randn(4, 16) * 3).requires_grad_()
    scale = torch.full((4, 1), 0.7, requires_grad=True)
    zero_point = torch.full((4, 1), 6.0, requires_grad=True)
    format = IntFormat(4, signed=False)
    g = torch.randn(4, 16)
    fake_quantize(x, QParams(scale, zero_point), format, PerChannel()).backward(g)
    v = x.detach().double() / scale.detach().double() + 6
    inside = (v >= 0) & (v <= 15)
    q = v.round().clamp(0, 15)
    assert 0 < (~inside).sum() < x.numel()
    assert close(x.grad, g * inside)
    assert close(scale.grad, (g * torch.where(inside, q - v, q - 6)).sum(1, keepdim=True))
    assert close(zero_point.grad, (-0.7 * g * ~inside).sum(1, keepdim=True))


def test_a_codebook_entry_gets_the_sum_of_its_members():
    x = torch.randn(4, 32, requires_grad=True)
    scale = torch.full((4, 2), 0.5)
    codebook = torch.randn(4, 1, 8).sort().values.requires_grad_()
    g = torch.randn(4, 32)
    qparams = QParams(scale, codebook=codebook)
    fake_quantize(x, qparams, CodebookFormat(8), PerGroup(16)).backward(g)
    codes = quantize(x.detach(), qparams, CodebookFormat(8), PerGroup(16)).codes
    expected = torch.stack([(g * 0.5 * (codes == k)).sum(1) for k in range(8)], dim=1)
    assert close(codebook.grad[:, 0], expected)
    assert torch.equal(x.grad, g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_rounded_up_to_storage(dtype):
    scale = torch.rand(10_000) * 10 + 1e-3
    rounded = round_up_to_storage(scale, dtype)
    assert (rounded >= scale).all()
    assert (rounded <= scale * (1 + torch.finfo(dtype).eps)).all()
    assert torch.equal(rounded.to(dtype).float(), rounded)
    assert torch.equal(round_to_storage(rounded, dtype), rounded)


@pytest.mark.parametrize("rule", [absmax_params, minmax_params], ids=["absmax", "minmax"])
def test_dynamic_scales_never_clip(rule):
    view = torch.randn(50, 64) * 10 ** torch.linspace(-6, 6, 50)[:, None]
    format = IntFormat(4, signed=rule is absmax_params)
    params = rule(view, format, torch.bfloat16)
    v = view / params.scale + (0 if params.zero_point is None else params.zero_point)
    low, high = format.range()
    # With a zero point, its own rounding moves the ends by at most half a step.
    slack = 0 if params.zero_point is None else 0.5
    assert (v >= low - slack).all()
    assert (v <= high + slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_more_bits_and_smaller_groups_lower_the_error(bits):
    x = torch.randn(32, 256)

    def error(width, group):
        granularity, format = PerGroup(group), IntFormat(width)
        params = absmax_params(granularity.view(x), format, torch.float32)
        qparams = QParams(params.scale.view(granularity.param_shape(x.shape)))
        return (fake_quantize(x, qparams, format, granularity) - x).square().sum()

    assert error(bits + 1, 64) < error(bits, 64)
    assert error(bits, 32) < error(bits, 64) < error(bits, 128)
