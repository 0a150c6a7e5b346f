"""The definition of fake quantization: its gradients against closed forms, in float64."""

import pytest
import torch

from qat.numerics.dynamic import absmax_params, minmax_params
from qat.numerics.formats import CodebookFormat, IntFormat
from qat.numerics.functional import fake_quantize, quantize
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.qtensor import QParams, scale_down
from qat.numerics.ste import exp2_to_storage, round_to_storage, round_up_to_storage, straight_through


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_powers_of_two_are_those_of_the_definition(dtype):
    exponent, g = (2 * torch.randn(1000)).requires_grad_(), torch.randn(1000)
    found = exp2_to_storage(exponent, dtype, 0.25)
    (gradient,) = torch.autograd.grad(found, exponent, g)
    expected = round_to_storage(torch.exp2(exponent), dtype)
    (of_definition,) = torch.autograd.grad(expected, exponent, g)
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient, of_definition * 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiler_finds_no_conversions_of_scales_to_drop(dtype):
    """Inductor of torch 2.11 takes float32 -> bfloat16 -> float32 for nothing."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = every.view(torch.int32) + torch.tensor([[0], [1], [-1], [0x800], [0xFFF], [0x1000], [0x1001], [0x8000]])
    value, graphs = between.view(torch.float32).flatten(), []
    value = torch.cat([value, torch.randn(10_000), 1e-6 * torch.randn(10_000), torch.tensor([65519.9, 65520, 1e6])])

    def both(x):
        return round_to_storage(x, dtype), round_up_to_storage(x.abs(), dtype)

    torch._dynamo.reset()
    found = torch.compile(both, backend=lambda graph, _: graphs.append(graph.code) or graph, fullgraph=True)(value)
    assert "float16" not in graphs[0]
    for a, b in zip(found, both(value), strict=True):
        assert torch.equal(a.nan_to_num(7, 8, -8), b.nan_to_num(7, 8, -8))


def groups_of_all_kinds():
    """Normal, shifted, on one side of zero, next to nothing on one side, zeros, denormals, and huge."""
    normal = torch.randn(200, 64) * 10 ** torch.linspace(-6, 6, 200)[:, None]
    shifted = torch.randn(200, 64) + 2 * torch.randn(200, 1)
    crumb = torch.randn(50, 64).abs()
    crumb[:, 0] = -1e-30
    denormal, huge = torch.randn(10, 64) * 1e-40, torch.rand(10, 64) * 1.5e38
    return torch.cat(
        [normal, shifted, shifted.abs(), -shifted.abs(), crumb, -crumb, torch.zeros(1, 64), denormal, huge]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_scales_never_clip(bits, dtype):
    """Not even by the last bit of a division."""
    view = groups_of_all_kinds()
    view = view.clamp(-6e4, 6e4) if dtype == torch.float16 else view
    format = IntFormat(bits)
    v = scale_down(view, absmax_params(view, format, dtype))
    low, high = format.range()
    assert (v >= low).all()
    assert (v <= high).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_are_integers_and_clip_by_half_a_step(bits):
    view = groups_of_all_kinds()
    format = IntFormat(bits, signed=False)
    low, high = format.range()
    params = minmax_params(view, format, torch.float32)
    assert torch.equal(params.zero_point, params.zero_point.round().clamp(low, high))
    assert (params.zero_point[view.amin(1) >= 0] == low).all()
    v = scale_down(view, params)
    assert (v >= low - 0.5001).all()
    assert (v <= high + 0.5001).all()
    spread = view.amax(1, keepdim=True).clamp(min=0) - view.amin(1, keepdim=True).clamp(max=0)
    expected = (spread / (high - low)).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.allclose(params.scale, expected, rtol=1e-6)


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
