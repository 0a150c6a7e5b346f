"""What is said where no kernel multiplies by a packed weight."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qat
from qat.kernels import dispatch
from qat.kernels.ops import reference_kernels
from qat.kernels.quantized_linear import fallback
from qat.quantizers import MinMaxQuantizer


@pytest.fixture
def packed(monkeypatch):
    fallback._warn.cache_clear()
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))
    qat.prepare(model, qat.Scheme(weight=lambda shape: MinMaxQuantizer(shape, bits=4), kv=None, head=True))
    return qat.convert(model)


def test_it_is_said_once(packed, caplog):
    caplog.set_level(logging.WARNING, fallback.__name__)  # a training run in this process turned it off
    with reference_kernels():
        packed(torch.randn(2, 32))
    assert not caplog.records
    for _ in range(2):
        packed(torch.randn(2, 32))
    (found,) = caplog.records
    assert (found.levelno, found.name) == (logging.WARNING, "qat.kernels.quantized_linear.fallback")
    assert "need a CUDA GPU" in found.message


@pytest.mark.parametrize(
    ("triton", "hopper", "dtype", "said"),
    [
        (False, True, torch.bfloat16, "pip install triton"),
        (True, False, torch.bfloat16, "capability 9.0"),
        (True, True, torch.float32, "product in float32: cast the model"),
        (True, True, torch.bfloat16, "layers of int5 per_channel"),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, triton, hopper, dtype, said):
    monkeypatch.setattr(dispatch, "_HAS_TRITON", triton)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0) if hopper else (8, 0))
    assert said in fallback.reason(
        SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda")), "int5", "per_channel"
    )
