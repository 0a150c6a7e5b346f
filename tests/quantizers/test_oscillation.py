"""Oscillations, their freezing and dampening against plain computations, element by element."""

from functools import partial

import pytest
import torch

from qat.errors import InputError
from qat.numerics.formats import CodebookFormat, IntFormat, parse_format
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    VectorQuantizer,
)
from qat.quantizers.oscillation import FROZEN, CodeHistory, check_settles, codes_of, dampening

GRIDS = {
    "lsq": partial(LSQQuantizer, bits=3, granularity="per_group_32"),
    "lsq+": partial(LSQQuantizer, bits=3, symmetric=False),
    "stretched": partial(LSQQuantizer, bits=2, grid="stretched"),
    "kmeans": partial(KMeansQuantizer, bits=3),
    "static": partial(MinMaxQuantizer, bits=4, dynamic=False),
    "fp8": partial(MinMaxQuantizer, format="fp8_e4m3", dynamic=False),
}


def quantizer_of(make, weight):
    quantizer = make(shape=weight.shape)
    quantizer.initialize(weight)
    return quantizer


class Plain:
    """The algorithm of the paper for one weight, in Python numbers; codes are places in the order of values."""

    def __init__(self, place):
        self.place, self.direction, self.f, self.mean, self.frozen = place, 0, 0.0, float(place), None

    def update(self, place, threshold, m):
        if self.frozen is not None:
            return
        d = (place > self.place) - (place < self.place)
        o = d != 0 and d == -self.direction
        self.f = m * o + (1 - m) * self.f
        self.mean = m * place + (1 - m) * self.mean
        self.direction, self.place = d or self.direction, place
        if self.f > threshold:
            self.frozen = round(self.mean)


@pytest.mark.parametrize("format", [IntFormat(4), IntFormat(8, signed=False), CodebookFormat(8)], ids=str)
def test_histories_are_those_of_the_paper(format):
    """Fractions with few digits, which float16 holds, so that thresholds decide alike."""
    low, high = format.code_range
    generator = torch.Generator().manual_seed(3)
    steps = [torch.randint(0, 3, (5, 7), generator=generator) + (high - 3) for _ in range(12)]
    codes = [step.clamp(low, high).to(format.code_dtype) for step in steps]
    history = CodeHistory(format, codes[0])
    plain = [Plain(int(code)) for code in codes[0].flatten()]
    for step in codes[1:]:
        history.update(step, 0.4, 0.25)
        for own, code in zip(plain, step.flatten(), strict=True):
            own.update(int(code), 0.4, 0.25)
        frozen = torch.tensor([own.frozen is not None for own in plain]).view(5, 7)
        assert torch.equal(history.frozen, frozen)
        expected = torch.tensor([own.place if own.frozen is None else own.frozen for own in plain]).view(5, 7)
        assert torch.equal(history.codes.long(), expected)
        f = torch.tensor([own.f for own in plain]).view(5, 7)
        torch.testing.assert_close(history.frequency.float()[~frozen], f[~frozen], rtol=2e-3, atol=1e-4)
    assert 0 < int(history.frozen.sum()) < 35


def test_one_that_moves_one_way_never_freezes():
    history = CodeHistory(IntFormat(4), torch.full((1, 1), -7, dtype=torch.int8))
    for code in range(-6, 8):
        history.update(torch.full((1, 1), code, dtype=torch.int8), 0.01, 0.5)
    assert not history.frozen.any()
    assert history.frequency == 0


def test_slow_means_of_wide_codes_are_kept():
    """In float16 a mean of 100 has no room for a hundredth of a step."""
    history = CodeHistory(IntFormat(8), torch.full((1, 1), 100, dtype=torch.int8))
    mean = 100.0
    for step in range(200):
        code = 100 + (step % 4 != 0)
        history.update(torch.full((1, 1), code, dtype=torch.int8), None, 0.01)
        mean = 0.01 * code + 0.99 * mean
    assert float(history.codes) + float(history.mean) == pytest.approx(mean, abs=5e-3)


def test_codes_of_floats_are_ordered_by_their_values():
    """Upwards through zero in fp8, where negative codes count the other way round."""
    values = parse_format("fp8_e4m3")
    up = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5]]).T
    codes = values.encode(up)
    history = CodeHistory(values, codes[:1])
    for code in codes[1:]:
        history.update(code[None], 0.01, 0.5)
    assert history.direction == 1
    assert not history.frozen.any()
    history.update(values.encode(torch.tensor([[-1.0]])), 0.01, 0.5)
    assert history.frozen.all()
    assert history.codes.dtype == torch.uint8


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_frozen_keeps_its_code(make, dtype):
    """Whatever the optimizer did to the weight, and to scales and codebooks too."""
    weight = torch.randn(8, 64).to(dtype)
    quantizer = quantizer_of(make, weight)
    history = CodeHistory(quantizer.format, codes_of(quantizer, weight))
    assert torch.equal(history.codes, quantizer.quantize(weight).codes)
    frozen = torch.rand(8, 64) < 0.5
    history.direction[frozen] = FROZEN
    kept = history.codes.clone()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(1.05)
        moved = weight * 0.7 + 0.3
        history.update(codes_of(quantizer, moved), 0.5, 0.01)
        held = history.held(moved, quantizer)
    assert torch.equal(codes_of(quantizer, held)[frozen], kept[frozen])
    assert torch.equal(held[~frozen], moved[~frozen])
    if dtype == torch.float32:
        assert torch.equal(quantizer(held)[frozen], held[frozen])


def test_a_history_is_taken_up_again_to_the_bit():
    codes = [torch.randint(0, 3, (4, 4)).to(torch.int8) for _ in range(9)]
    whole, first = CodeHistory(IntFormat(4), codes[0]), CodeHistory(IntFormat(4), codes[0])
    for step in codes[1:]:
        whole.update(step, 0.3, 0.25)
    for step in codes[1:5]:
        first.update(step, 0.3, 0.25)
    again = CodeHistory(IntFormat(4), codes[0])
    again.load_state_dict(first.state_dict())
    for step in codes[5:]:
        again.update(step, 0.3, 0.25)
    for name, value in whole.state_dict().items():
        assert value == again.state_dict()[name] if name == "format" else torch.equal(value, again.state_dict()[name])


def test_a_history_of_another_grid_is_forgotten():
    history = CodeHistory(IntFormat(3), torch.zeros(2, 2, dtype=torch.int8))
    history.load_state_dict(CodeHistory(IntFormat(4), torch.ones(2, 2, dtype=torch.int8)).state_dict())
    assert not history.codes.any()


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_dampening_is_the_derivative_of_the_regulariser(make):
    """Against autograd through clip(w), with the ends of the grid and w_hat as constants."""
    weight = torch.randn(8, 64)
    quantizer = quantizer_of(make, weight)
    w = (1.2 * weight).requires_grad_()
    q = quantizer.quantize(w)
    low, high = q.format.code_range
    params = q.qparams
    if q.qparams.codebook is not None:
        ends = params.codebook.float()[..., [0, -1]] * params.scale.float()[..., None]
    else:
        zero = 0 if params.zero_point is None else params.zero_point.float()
        low, high = q.format.range()
        ends = torch.stack([(low - zero) * params.scale.float(), (high - zero) * params.scale.float()], -1)
    ends = ends.repeat_interleave(w.shape[1] // ends.shape[1], dim=1)
    clipped = torch.minimum(torch.maximum(w, ends[..., 0]), ends[..., 1])
    loss = (q.dequantize() - clipped).square()
    loss[(w < ends[..., 0]) | (w > ends[..., 1])].sum().backward(retain_graph=True)
    assert not w.grad.any()
    loss.sum().backward()
    value, gradient = dampening(quantizer, w)
    beyond = (w < ends[..., 0]) | (w > ends[..., 1])
    torch.testing.assert_close(value, loss[~beyond].sum().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, w.grad, rtol=1e-4, atol=1e-6)
    assert beyond.any()


def test_pruned_weights_are_not_dampened():
    weight = torch.randn(4, 32)
    quantizer = quantizer_of(GRIDS["lsq"], weight)
    quantizer.set_mask(torch.rand(4, 32) < 0.5)
    _, gradient = dampening(quantizer, weight)
    assert not gradient[~quantizer.mask].any()
    assert gradient[quantizer.mask].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(MinMaxQuantizer, bits=4), "follow from the weights at every step.*dynamic=false"),
        (MicroscalingQuantizer, "take quantizer@scheme.weight=lsq"),
        (NVFP4Quantizer, "take quantizer@scheme.weight=lsq"),
        (VectorQuantizer, "stand for vectors"),
    ],
    ids=["minmax", "mx", "nvfp4", "vector"],
)
def test_grids_that_do_not_stay_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        check_settles(make(shape=(64, 64)))
