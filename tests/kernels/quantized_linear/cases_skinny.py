"""The kernel for few tokens, its assembly on the machine of `ptx.py`, equals the definition.

`test_interpreted.py` runs this in a process with Triton's interpreter.
"""

import pytest
import torch

from qat.kernels.quantized_linear import skinny, streamed_product
from qat.kernels.quantized_linear.launches import Skinny
from qat.kernels.quantized_linear.weight import table_words, tiled
from tests.kernels.quantized_linear import machine
from tests.kernels.quantized_linear.weights import KINDS, ids, quantized


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(skinny.tl, "inline_asm_elementwise", machine.inline_asm_elementwise)
    return streamed_product


def check(kernel, kind, shape, tokens, dtype=torch.bfloat16, how=None, bias=False, scale_dtype=torch.bfloat16):
    q = quantized(kind, shape, scale_dtype=scale_dtype)
    weight = tiled(q)
    words = None if weight.table is None else table_words(weight.table, weight.layout, dtype)
    x, own = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if bias else None
    y = kernel.run(x, weight, words, own, how or Skinny())
    exact = x.double() @ q.dequantize().double().T + (0 if own is None else own.double())
    assert y.dtype == dtype
    assert y.shape == exact.shape
    # The interpreter cuts bfloat16 off instead of rounding it.
    eps = 2**-7 if dtype == torch.bfloat16 else 2**-10
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_every_kind(kernel, kind):
    check(kernel, kind, (32, 512), 3, how=Skinny(2, 2))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5], KINDS[9], KINDS[14], KINDS[17], KINDS[7], KINDS[13]], ids=ids)
def test_float16(kernel, kind):
    check(kernel, kind, (32, 256), 2, torch.float16, Skinny(1, 1))


@pytest.mark.parametrize("shape", [(1, 64), (17, 320), (37, 1600), (50, 832)], ids=str)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[5], KINDS[10]], ids=ids)
def test_sizes_that_are_no_multiples(kernel, shape, ahead, kind):
    check(kernel, kind, shape, 5, how=Skinny(4, 2, 168, ahead), bias=True)


@pytest.mark.parametrize("columns", [33, 1001])
def test_columns_that_16_bytes_do_not_divide(kernel, columns):
    check(kernel, ("int4", "per_channel", ""), (20, columns), 2)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 32])
def test_tokens(kernel, tokens):
    check(kernel, KINDS[0], (48, 1280), tokens, how=Skinny(4, 4))


def test_float32_scales(kernel):
    for kind in (KINDS[0], KINDS[1], KINDS[2], KINDS[3]):
        check(kernel, kind, (32, 256), 2, how=Skinny(1, 1), scale_dtype=torch.float32)


def test_x_need_not_be_contiguous(kernel):
    q = quantized(KINDS[0], (16, 256))
    wide = torch.randn(256, 6).bfloat16()
    y = kernel.run(wide.T[1:3], tiled(q), None, None, Skinny(1, 1))
    assert torch.equal(y, kernel.run(wide.T[1:3].contiguous(), tiled(q), None, None, Skinny(1, 1)))
