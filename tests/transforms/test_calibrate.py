"""Calibration: what it refuses, and what it leaves out."""

from functools import partial

import pytest
import torch
from torch import nn

import qat
from qat.errors import InputError
from qat.quantizers import LSQQuantizer, MinMaxQuantizer

STATIC = partial(MinMaxQuantizer, granularity="per_tensor", dynamic=False)
INPUTS = {
    "minmax": STATIC,
    "percentile": partial(STATIC, observer="percentile"),
    "mse": partial(STATIC, observer="mse"),
    "lsq": partial(LSQQuantizer, granularity="per_tensor"),
}


def prepared(make):
    return qat.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), qat.Scheme(weight=MinMaxQuantizer, input=make))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", INPUTS)
def test_what_no_grid_holds_is_refused_by_the_name_of_its_layer(name, bad):
    model = prepared(INPUTS[name])
    x = torch.randn(4, 8)
    x[0, 0] = bad
    with pytest.raises(InputError, match=r"^0\.input_quantizer saw NaN or infinity while calibrating"):
        qat.calibrate(model, [torch.randn(4, 8), x])
    assert not model[0].input_quantizer.initialized
    qat.calibrate(model, [torch.randn(4, 8)])
    assert torch.isfinite(model(torch.randn(4, 8))).all()


def test_batches_without_tokens_say_nothing():
    x = torch.randn(3, 8)
    scales = []
    for batches in ([x], [torch.zeros(0, 8), x, torch.zeros(0, 8)]):
        model = prepared(STATIC)
        qat.calibrate(model, batches)
        scales.append(model[0].input_quantizer.scale)
    assert torch.equal(*scales)
    with pytest.raises(InputError, match=r"0\.input_quantizer saw no data"):
        qat.calibrate(prepared(STATIC), [torch.zeros(0, 8)])
