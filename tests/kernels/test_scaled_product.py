"""Products of codes: what tensor cores are asked for equals the definition, at any size."""

import pytest
import torch

from qat.errors import InputError
from qat.kernels import dispatch
from qat.kernels import product_ops as ops
from qat.kernels.scaled_product import reference, tensor_cores
from qat.kernels.scaled_product.operand import Operand
from qat.numerics.formats import parse_format

# Rows of a, rows of b, and what is summed: odd ones, and those that tensor cores take without padding.
SIZES = [(1, 1, 1), (5, 7, 33), (17, 40, 24), (32, 48, 64)]
PAIRS = [("int8", "int8"), ("int8", "int4"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e4m3")]


def operand(rows, k, name, scales):
    format = parse_format(name)
    codes = format.encode(torch.randn(rows, k) * (40 if name.startswith("int") else 8))
    scale = None if scales is None else torch.rand(rows if scales == "rows" else 1, 1) + 0.5
    return Operand(codes, scale, format)


def exact(a, b):
    """In float64, from the values that the formats decode."""
    values = [o.format.decode(o.codes).double() * (1 if o.scale is None else o.scale.double()) for o in (a, b)]
    return values[0] @ values[1].T


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scales", [("rows", "rows"), ("one", "rows"), ("rows", None), (None, None)], ids=str)
@pytest.mark.parametrize(
    "names", [("int8", "int8"), ("int8", "int4"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "fp8_e4m3")]
)
@pytest.mark.parametrize("module", [reference, tensor_cores])
def test_the_product_is_that_of_the_values(sizes, scales, names, module):
    m, n, k = sizes
    a, b = operand(m, k, names[0], scales[0]), operand(n, k, names[1], scales[1])
    y = module.scaled_product(a, b, torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact(a, b), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("names", [("int8", "int8"), ("fp8_e4m3", "fp8_e4m3")], ids=str)
@pytest.mark.parametrize("scales", [("rows", "rows"), ("one", None)], ids=str)
def test_bfloat16_is_rounded_once(names, scales):
    a, b = operand(33, 48, names[0], scales[0]), operand(20, 48, names[1], scales[1])
    y = tensor_cores.scaled_product(a, b, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact(a, b), rtol=2**-8, atol=1e-5)


def test_integers_are_summed_exactly():
    """In float32 the sum of 4096 products of 127 and 127 would lose its last bits."""
    codes = torch.full((17, 4096), 127, dtype=torch.int8)
    codes[:, 0] = 1
    whole = Operand(codes, None, parse_format("int8"))
    expected = 4095 * 127**2 + 1
    assert tensor_cores.scaled_product(whole, whole, torch.float64).eq(float(torch.tensor(expected).float())).all()
    assert torch._int_mm(codes, codes.T).eq(expected).all()


def test_no_rows_and_nothing_to_sum():
    integers = parse_format("int8")
    empty, some = (Operand(torch.zeros(rows, 16, dtype=torch.int8), None, integers) for rows in (0, 3))
    assert tensor_cores.scaled_product(empty, some, torch.float32).shape == (0, 3)
    nothing = Operand(torch.zeros(3, 0, dtype=torch.int8), None, integers)
    assert torch.equal(tensor_cores.scaled_product(nothing, nothing, torch.float32), torch.zeros(3, 3))


def test_sums_that_int32_cannot_hold_are_refused():
    codes = torch.full((1, 2**17 - 1), -128, dtype=torch.int8)
    longest = Operand(codes, None, parse_format("int8"))
    assert tensor_cores.scaled_product(longest, longest, torch.float64).item() == float(2**14 * (2**17 - 1))
    too_long = longest._replace(codes=torch.zeros(1, 2**17 + 1, dtype=torch.int8))
    with pytest.raises(InputError, match="accumulate_grad_batches"):
        tensor_cores.scaled_product(too_long, too_long, torch.float32)


def test_references_only_means_the_reference(monkeypatch):
    a = operand(4, 16, "int8", "rows")
    monkeypatch.setattr(tensor_cores, "scaled_product", None)
    with dispatch.reference_kernels():
        assert ops.scaled_product(a, a, torch.float32).shape == (4, 4)
    with pytest.raises(TypeError):
        ops.scaled_product(a, a, torch.float32)
