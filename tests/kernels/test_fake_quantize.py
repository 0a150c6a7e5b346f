"""The Triton kernels against the references: every grid, sizes of every kind, to the bit where nothing is summed."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch

from qat.kernels import ops
from qat.kernels.fake_quantize import reference
from qat.numerics.dynamic import DYNAMIC_RULES
from qat.numerics.formats import parse_format
from qat.numerics.qtensor import ViewParams
from tests.kernels.interpreter import interpreted

FORMATS = [
    *("int2", "int4", "int8", "uint4", "levels2", "levels3", "levels4", "levels8"),
    *("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"),
    *("codebook2", "codebook5", "codebook16", "codebook40", "codebook256"),
]
LEARNED = ["int4", "uint4", "levels4", "fp8_e4m3", "codebook16", "codebook40"]
# Groups and elements: short and many, odd, one long, no power of two.
SIZES = [(6, 64), (3, 300), (1, 5000), (70, 20)]
RULES = [
    *(("int8", "absmax"), ("levels3", "absmax"), ("fp8_e4m3", "absmax"), ("codebook16", "absmax")),
    *(("uint2", "minmax"), ("uint8", "minmax"), ("fp4_e2m1", "microscaling"), ("fp8_e5m2", "microscaling")),
]
STORAGE = [torch.bfloat16, torch.float16, torch.float32]


def tables_of(groups):
    """How many codebooks that many groups may have."""
    return sorted({groups, groups // 2 if groups % 2 == 0 else 1, 1})


def grids(name, groups):
    """Grids that clip some of three times normal values, with every sharing of a codebook."""
    format = parse_format(name)
    scale = 2.0 / format.range()[1] * (0.5 + torch.rand(groups, 1))
    if format.name.startswith("codebook"):
        # No quantizer gives a codebook a zero point, but kernels know no quantizers.
        zero_points = [None, torch.randint(-2, 3, (groups, 1)).float()] if name == "codebook16" else [None]
        for rows, zero_point in product(tables_of(groups), zero_points):
            yield format, ViewParams(scale, zero_point, torch.randn(rows, format.entries).sort().values)
    else:
        yield format, ViewParams(scale, torch.randint(0, 15, (groups, 1)).float() if name[0] == "u" else None)


def values(groups, elements, params, dtype):
    """Normal values, ties, and some far beyond the grid, as the dtype holds them."""
    x = 3 * torch.randn(groups, elements)
    x[0, :10] = params.scale[0] * torch.tensor([0.0, -0.0, 0.5, 1.5, -0.5, 2.5, 1e4, -1e4, 0.25, 1e-30])
    return x.to(dtype)


def same(found, expected, what):
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True, msg=str(what))


def spoilt(x):
    """`x` with a value that is no number: a training that diverges must not look healthy."""
    x = x.clone()
    x[-1, 3] = float("nan")
    return x


def compare_codes_and_values(device, formats=FORMATS):
    from qat.kernels.fake_quantize import triton

    torch.manual_seed(0)
    cases = list(product(formats, SIZES, [torch.float32]))
    if device != "cpu":  # Triton's interpreter does not round to bfloat16
        cases += product(formats, SIZES[:1], [torch.bfloat16])
    for name, size, dtype in cases:
        for format, params in grids(name, size[0]):
            x, what = values(*size, params, dtype), (name, size, dtype)
            x[0, 10:12] = torch.tensor([3e38, -3e38])  # beyond what a quotient can be
            codes, x_hat = reference.quantize(x, params, format), torch.empty(size, dtype=dtype)
            reference.dequantize(codes, x_hat, params, format)
            there = ViewParams(*(None if param is None else param.to(device) for param in params))
            same(triton.quantize(x.to(device), there, format), codes, what)
            out = torch.empty(size, dtype=dtype, device=device)
            triton.dequantize(codes.to(device), out, there, format)
            same(out, x_hat, what)
            out = torch.empty(size, dtype=dtype, device=device)
            triton.fake_quantize(x.to(device), out, there, format)
            same(out, x_hat, what)
            reference.fake_quantize(spoilt(x), x_hat, params, format)
            triton.fake_quantize(spoilt(x).to(device), out, there, format)
            same(out, x_hat, what)
            assert x_hat.isnan().nonzero().tolist() == [[size[0] - 1, 3]], what


def compare_gradients(device, formats=LEARNED):
    from qat.kernels.fake_quantize import backward

    torch.manual_seed(0)
    for name, size in product(formats, SIZES):
        for format, params in grids(name, size[0]):
            healthy, all_there = values(*size, params, torch.float32), [param is not None for param in params[:3]]
            for x, needs, restore in product(
                (healthy, spoilt(healthy)),
                ([True, *all_there], [False] * 4, [True, False, False, False]),
                (True, False),
            ):
                what, g = (name, size, needs), torch.randn(size)
                dx, x_hat = g.clone(), torch.zeros(size) if restore else None
                expected = reference.fake_quantize_backward(dx, x, None, x_hat, needs, params, format)
                there = ViewParams(*(None if param is None else param.to(device) for param in params))
                own, own_hat = g.to(device), torch.zeros(size, device=device) if restore else None
                found = backward.fake_quantize_backward(own, x.to(device), None, own_hat, needs, there, format)
                same(own, dx, what)
                if restore:
                    same(own_hat, x_hat, what)
                for a, b, need in zip(found, expected, needs[1:], strict=True):
                    if need:
                        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-3, equal_nan=True)


def compare_dynamic_scales(device, rules=RULES, most=8192):
    """`most`: elements of a group that is read once; fewer make the loop over longer groups run."""
    from qat.kernels.fake_quantize import dynamic, tiles

    tiles.ONCE, tiles.STEP = most, min(tiles.STEP, most)
    torch.manual_seed(0)
    for (name, rule), (groups, elements) in product(rules, [*SIZES, (500, 32)]):
        format = parse_format(name)
        x = torch.randn(groups, elements) * torch.randn(groups, 1).exp()
        x[0], x[-1] = 0, x[-1].abs() * 1e-39
        for dtype in [torch.float8_e8m0fnu] if rule == "microscaling" else STORAGE:
            params, what = DYNAMIC_RULES[rule](x, format, dtype), (name, rule, groups, elements, dtype)
            scale, zero_point = dynamic.params(x.to(device), rule, dtype, format)
            same(scale, params.scale, what)
            if params.zero_point is not None:
                same(zero_point, params.zero_point, what)
            table = torch.randn(1, 16).sort().values if name == "codebook16" else None
            x_hat = torch.empty(x.shape)
            reference.fake_quantize(x, x_hat, params._replace(codebook=table), format)
            there = None if table is None else table.to(device)
            out = torch.empty(x.shape, device=device)
            dynamic.fake_quantize(x.to(device), out, rule, dtype, there, format)
            same(out, x_hat, what)
            dynamic.fake_quantize(spoilt(x).to(device), out, rule, dtype, there, format)
            assert out[-1, 3].isnan() if rule == "microscaling" else out[-1].isnan().all()
            assert out[:-1].isfinite().all()


CHECKS = {compare_codes_and_values: FORMATS, compare_gradients: LEARNED, compare_dynamic_scales: RULES}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "call", [*(f"{check.__name__}('cpu')" for check in CHECKS), "compare_dynamic_scales('cpu', most=512)"]
)
def test_triton_in_the_interpreter_equals_the_reference(call):
    interpreted(__name__, call)


@pytest.mark.gpu
@pytest.mark.parametrize(("check", "what"), [(check, what) for check, all in CHECKS.items() for what in all])
def test_triton_equals_the_reference(check, what):
    check("cuda", [what])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4", "codebook16"])
def test_the_same_tensors_give_the_same_bits(name):
    ((_, params), *_) = grids(name, 1)
    x = values(1, 2**20, params, torch.float32).cuda()
    params = ViewParams(*(None if param is None else param.cuda() for param in params))
    needs = [True, True, False, params.codebook is not None]
    runs = [ops._fake_quantize_backward_(x.clone(), x, None, None, needs, *params[:3], name) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_the_references_can_be_asked_for():
    x = torch.randn(4, 64, device="cuda")
    fast = ops.quantize_view(x, torch.ones(4, 1, device="cuda"), None, None, "int4")
    with ops.reference_kernels():
        assert not ops.quantizes_in_triton(x, parse_format("int4"))
        assert torch.equal(fast, ops.quantize_view(x, torch.ones(4, 1, device="cuda"), None, None, "int4"))
