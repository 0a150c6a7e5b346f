"""The kernels for many tokens, their assembly on the machine of `ptx.py`, equal the definition.

`test_interpreted.py` runs this in a process with Triton's interpreter. Products are in float16, because the interpreter
has no arithmetic of bfloat16.
"""

import pytest
import torch

from qat.kernels.quantized_linear import reference, tiled_product, wide
from qat.kernels.quantized_linear.launches import Wide
from qat.kernels.quantized_linear.weight import table_words, tiled
from tests.kernels.quantized_linear import machine
from tests.kernels.quantized_linear.weights import KINDS, ids, quantized


@pytest.fixture(autouse=True)
def assembly(monkeypatch):
    monkeypatch.setattr(wide.tl, "inline_asm_elementwise", machine.inline_asm_elementwise)


def words_of(weight, dtype):
    return None if weight.table is None else table_words(weight.table, weight.layout, dtype)


def check(kind, shape, tokens, how, bias=False, scale_dtype=torch.bfloat16):
    q, dtype = quantized(kind, shape, scale_dtype=scale_dtype), torch.float16
    weight = tiled(q)
    x, own = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if bias else None
    y = tiled_product.run(x, weight, words_of(weight, dtype), own, how)
    exact = x.double() @ q.dequantize().double().T + (0 if own is None else own.double())
    assert y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=2**-9, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_every_kind(kind, depth):
    check(kind, (64, 512), 5, Wide(64, 16, depth=depth))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[5], KINDS[7], KINDS[3], KINDS[10]], ids=ids)
@pytest.mark.parametrize("shape", [(1, 64), (37, 320), (70, 576)], ids=str)
@pytest.mark.parametrize("how", [Wide(64, 16), Wide(64, 16, 2, depth=4), Wide(128, 16, 4, warps=8)], ids=str)
def test_sizes_that_are_no_multiples(kind, shape, how):
    check(kind, shape, 19, how, bias=True)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("splits", [1, 2])
def test_every_program_has_its_place(tokens, splits):
    """Blocks of tokens are grouped by four, and the last group may be smaller."""
    check(KINDS[0], (150, 256), tokens, Wide(64, 16, splits), bias=True)


def test_columns_that_tiles_do_not_divide():
    check(("int4", "per_channel", ""), (20, 1001), 3, Wide(64, 16))
    check(("int3", "per_channel", ""), (20, 33), 3, Wide(64, 16, depth=4))


@pytest.mark.parametrize("depth", [2, 4])
def test_float32_scales(depth):
    for kind in (KINDS[0], KINDS[1], KINDS[2], KINDS[17]):
        check(kind, (32, 512), 3, Wide(64, 16, depth=depth), scale_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("shape", [(64, 256), (37, 640)], ids=str)
def test_the_matrix_is_that_of_the_definition(kind, shape, dtype):
    """To the bit: values are found in float32, or exactly, and rounded once."""
    if dtype == torch.bfloat16 and kind[1] == "per_channel":
        pytest.skip("the interpreter has no arithmetic of bfloat16")
    weight = tiled(quantized(kind, shape))
    found = tiled_product.dequantize(weight, words_of(weight, dtype), dtype)
    expected = reference.dequantize_rows(weight, 0, shape[0], dtype)
    if dtype == torch.float16 and weight.table is not None:  # entries are rounded to float16 first
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("columns", [64, 250, 1001, 2200])
def test_x_in_order(columns):
    x = torch.randn(3, columns).bfloat16()
    found = tiled_product.in_order(x, 16)
    steps = -(-columns // 256)
    assert found.shape == (16, steps * 256)
    padded = torch.nn.functional.pad(x, (0, steps * 256 - columns))
    expected = padded.view(3, -1, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(3, -1)
    assert torch.equal(found[:3], expected)
