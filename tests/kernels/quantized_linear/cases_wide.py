"""The kernels for many tokens, in Triton's interpreter, equal the definition; see `test_interpreted.py`.

In float16: the interpreter has no arithmetic of bfloat16.
"""

import pytest
import torch

from qat.kernels.quantized_linear import reference, tiled_product
from qat.kernels.quantized_linear.choice import Wide
from qat.kernels.quantized_linear.weight import tiled
from tests.kernels.quantized_linear.weights import KINDS, ids, quantized


def product(kind, shape, tokens, how, dtype=torch.float16, bias=False, scale_dtype=torch.bfloat16):
    q = quantized(kind, shape, scale_dtype=scale_dtype)
    x, own = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if bias else None
    y = tiled_product.run(x, tiled(q), None, own, how)
    exact = x.double() @ q.dequantize().double().T + (0 if own is None else own.double())
    return y, exact


def check(*arguments, **options):
    y, exact = product(*arguments, **options)
    assert y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=2**-9, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_every_kind(kind):
    check(kind, (64, 256), 5, Wide(64, 16))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[5], KINDS[7], KINDS[3]], ids=ids)
@pytest.mark.parametrize("shape", [(1, 64), (37, 320), (70, 576)], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_sizes_that_are_no_multiples(kind, shape, splits):
    check(kind, shape, 19, Wide(64, 16, splits), bias=True)


def test_columns_that_tiles_do_not_divide():
    check(("int4", "per_channel", ""), (20, 1001), 3, Wide(64, 16))


def test_float32_scales():
    for kind in (KINDS[0], KINDS[1], KINDS[2], KINDS[17]):
        check(kind, (32, 256), 3, Wide(64, 16), scale_dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("shape", [(64, 256), (37, 576)], ids=str)
def test_the_matrix_is_that_of_the_definition(kind, shape):
    if shape[1] % 128 and kind[1] == "per_group_128":
        shape = (37, 640)
    weight = tiled(quantized(kind, shape))
    found = tiled_product.dequantize(weight, None, torch.float16)
    expected = reference.dequantize_rows(weight, 0, shape[0], torch.float16)
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)
