"""Tensors without elements: what an expert quantizes that no token chose."""

from functools import partial

import pytest
import torch

from qat.numerics import functional
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    TableQuantizer,
    VectorQuantizer,
)

DYNAMIC = {
    "absmax": MinMaxQuantizer,
    "minmax": partial(MinMaxQuantizer, bits=4, symmetric=False),
    "stochastic": partial(MinMaxQuantizer, bits=4, rounding="stochastic"),
    "floats": partial(MinMaxQuantizer, format="fp8_e4m3"),
    "microscaling": MicroscalingQuantizer,
    "table": TableQuantizer,
    "double": partial(TableQuantizer, double_quant=True),
    "stochastic table": partial(TableQuantizer, rounding="stochastic"),
    "absmean": partial(TableQuantizer, family="binary", bits=1, rule="absmean"),
    "twn": partial(TableQuantizer, family="ternary", bits=2, rule="twn"),
}
FITTED = {
    "minmax": partial(MinMaxQuantizer, dynamic=False),
    "percentile": partial(MinMaxQuantizer, dynamic=False, symmetric=False, observer="percentile"),
    "lsq": LSQQuantizer,
    "lsq+": partial(LSQQuantizer, symmetric=False),
    "stretched": partial(LSQQuantizer, bits=2, grid="stretched"),
    "kmeans": partial(KMeansQuantizer, bits=3),
    "soft kmeans": partial(KMeansQuantizer, bits=3, temperature=0.1),
}


def check(quantizer):
    """Forward, backward, stored, and by the definition."""
    x = torch.zeros(0, 64, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    assert all(p.grad is None or (p.grad == 0).all() for p in quantizer.parameters())
    x = x.detach()
    assert quantizer.quantize(x).dequantize().shape == (0, 64)
    assert functional.fake_quantize(x, quantizer.qparams(x), quantizer.format, quantizer.granularity).shape == (0, 64)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_channel_-1", "per_token", "per_group_16"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_no_tokens_for_scales_of_their_own(name, granularity):
    check(DYNAMIC[name]((64,), granularity=granularity))


@pytest.mark.parametrize("granularity", ["per_block_4x16", "per_flat_group_16"])
def test_no_tokens_in_blocks(granularity):
    check(MinMaxQuantizer((8, 64), granularity=granularity))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel_-1"])
@pytest.mark.parametrize("name", FITTED)
def test_no_tokens_for_scales_that_are_known(name, granularity):
    quantizer = FITTED[name]((64,), granularity=granularity)
    quantizer.initialize(torch.randn(20, 64))
    check(quantizer)


def test_no_tokens_for_vectors():
    quantizer = VectorQuantizer((64,), bits=2, granularity="per_tensor")
    quantizer.initialize(torch.randn(20, 64))
    check(quantizer)
