from functools import partial

import pytest
import torch

from qat.errors import InputError
from qat.numerics.formats import IntFormat, LevelFormat
from qat.quantizers import FixedQuantizer, KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer
from qat.quantizers.step_codes import StepCodes

GRIDS = {
    "lsq": partial(LSQQuantizer, granularity="per_group_32"),
    "lsq+": partial(LSQQuantizer, symmetric=False),
    "stretched": partial(LSQQuantizer, grid="stretched"),
    "minmax": partial(MinMaxQuantizer),
    "asymmetric": partial(MinMaxQuantizer, symmetric=False),
    "static": partial(MinMaxQuantizer, dynamic=False),
    "static asymmetric": partial(MinMaxQuantizer, dynamic=False, symmetric=False),
}


def ends(quantizer, weight):
    """The lowest and the highest value that each group can hold, and half a step."""
    params = quantizer.qparams(weight).for_view()
    zero = 0 if params.zero_point is None else params.zero_point
    low, high = quantizer.format.range()
    return torch.cat(
        [(low - zero) * params.scale, (high - zero) * params.scale], 1
    ).detach(), params.scale.detach().clone()


@pytest.mark.parametrize("make", GRIDS.values(), ids=GRIDS)
def test_the_range_stays(make):
    """To a step of the coarser grid, which is not symmetric and rounds zero points; its width as bfloat16 holds it."""
    weight = torch.randn(8, 64)
    quantizer = make(shape=weight.shape, bits=8)
    quantizer.initialize(weight)
    (before, step), parameters = ends(quantizer, weight), [id(p) for p in quantizer.parameters()]
    quantizer.step_codes = StepCodes()
    quantizer.train().linear(torch.randn(2, 64), weight.clone().requires_grad_(), None)
    for bits in (6, 4, 8):
        quantizer.set_bits(bits)
        assert quantizer.format.bits == bits
        assert quantizer.step_codes._found is None
        after, new_step = ends(quantizer, weight)
        assert ((after - before).abs() <= torch.maximum(step, new_step)).all()
        width = (after[:, 1] - after[:, 0]) / (before[:, 1] - before[:, 0])
        if quantizer.rule is None:
            torch.testing.assert_close(width, torch.ones_like(width), rtol=0.01, atol=0)
        before, step = after, new_step
        q = quantizer.quantize(weight)
        assert torch.equal(q.dequantize(), quantizer(weight))
        assert q.codes.unique().numel() <= 2**bits
    assert [id(p) for p in quantizer.parameters()] == parameters


def test_rules_and_fresh_quantizers_agree():
    weight = torch.randn(8, 64)
    changed, fresh = MinMaxQuantizer(weight.shape, bits=8), MinMaxQuantizer(weight.shape, bits=3)
    changed.set_bits(3)
    assert torch.equal(changed(weight), fresh(weight))


def test_learned_scales_become_as_much_larger_as_codes_become_fewer():
    weight = torch.randn(8, 64)
    quantizer = LSQQuantizer(weight.shape, bits=8, symmetric=False)
    quantizer.initialize(weight)
    scale, zero = torch.exp2(quantizer.log_scale.detach()), quantizer.zero_point.detach().clone()
    quantizer.set_bits(4)
    torch.testing.assert_close(torch.exp2(quantizer.log_scale.detach()), scale * 255 / 15)
    torch.testing.assert_close(quantizer.zero_point.detach(), zero * 15 / 255)


def test_formats_have_others_of_their_kind():
    assert IntFormat(8, signed=False).with_bits(3) == IntFormat(3, signed=False)
    assert LevelFormat(256).with_bits(1) == LevelFormat(2)
    for format, bits in ((IntFormat(4), 9), (LevelFormat(3), 4), (LevelFormat(4), 9)):
        with pytest.raises(InputError):
            format.with_bits(bits)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: KMeansQuantizer(w.shape),
        lambda w: TableQuantizer(w.shape),
        lambda w: MinMaxQuantizer(w.shape, format="fp8_e4m3"),
        lambda w: LSQQuantizer(w.shape, bits=2, grid="ternary"),
        lambda w: FixedQuantizer(MinMaxQuantizer(w.shape, bits=8), w),
    ],
    ids=["kmeans", "table", "float", "ternary", "fixed"],
)
def test_grids_of_one_size_are_refused(make):
    quantizer = make(torch.randn(8, 64))
    before = quantizer.format
    with pytest.raises(InputError, match=r"quantizer@scheme\.weight=lsq or minmax"):
        quantizer.set_bits(3)
    assert quantizer.format == before
