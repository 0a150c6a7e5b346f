"""Codes of operands: the kernels against the reference to the bit, and gradients rounded at random without bias."""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch

from qat.kernels import dispatch, product_ops
from qat.kernels.operand_codes import reference
from qat.numerics.formats import parse_format
from qat.numerics.granularity import PerToken

FORMATS = ["int4", "int8", "fp8_e4m3", "fp8_e5m2"]
# Rows and columns: tiles in full, odd ones, fewer columns than noise comes in, one row, several tiles high.
SIZES = [(128, 64), (37, 72), (6, 5), (1, 200), (300, 24)]
STORAGE = [torch.bfloat16, torch.float16, torch.float32]


def values(rows, columns):
    """Rows and columns of very different size, ties, and a column of zeros."""
    x = torch.randn(rows, columns) * torch.randn(rows, 1).exp() * torch.randn(1, columns).exp()
    x[:, -1] = 0
    x[0, :3] = torch.tensor([0.5, -1.5, 2.5])
    return x


def factors(n, along):
    yield (torch.rand(n) + 0.1).unsqueeze(along)
    yield torch.full((1, 1), 0.3)


if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from qat.kernels.operand_codes.tiles import noise_at

    @triton.jit
    def _read_noise(seed, out, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        noise = noise_at(tl.load(seed), row, 0, columns, WIDTH)
        tl.store(out + row[:, None] * WIDTH + column[None, :], noise)


def noise_of(seed, rows, columns, device):
    """What the kernels draw for each element, read out by one of its own."""
    height, width = (max(8, 1 << (n - 1).bit_length()) for n in (rows, columns))
    out = torch.empty(height, width, device=device)
    _read_noise[(1,)](seed, out, columns, ROWS=height, WIDTH=width)
    return out[:rows, :columns].cpu()


def compare(device, names=FORMATS, sizes=SIZES, most=16384):
    """`most`: elements of a row that is read once; fewer make the loop over longer rows run."""
    from qat.kernels.operand_codes import columns, rows

    rows._MOST, rows.TILE = most, min(rows.TILE, most)
    torch.manual_seed(0)
    for name, (tall, wide), seeded in product(names, sizes, [False, True]):
        x, format, what = values(tall, wide), parse_format(name), (name, tall, wide, seeded)
        seed = torch.randint(2**62, (1,), device=device) if seeded else None
        noise = noise_of(seed, tall, wide, device) if seeded else None
        dtype = STORAGE[(tall + wide) % 3]
        for factor in [None, *factors(wide, 0)]:
            expected = reference.row_codes(x, factor, noise, dtype, format)
            there = None if factor is None else factor.to(device)
            same(rows.row_codes(x.to(device), there, seed, dtype, format), expected, what)
        for factor in factors(tall, 1):
            expected = reference.column_codes(x, factor, None if noise is None else noise.T, dtype, format)
            same(columns.column_codes(x.to(device), factor.to(device), seed, dtype, format), expected, what)


def compare_spoilt(device):
    """A training that diverges must not look healthy: NaN comes through, and reaches no other row."""
    from qat.kernels.operand_codes import columns, rows

    x = values(40, 24).to(device)
    x[7, 5] = float("nan")
    _, scale = rows.row_codes(x, None, None, torch.float32, parse_format("int8"))
    assert scale[:, 0].isnan().nonzero().tolist() == [[7]]
    _, scale = columns.column_codes(x, torch.ones(1, 1, device=device), None, torch.float32, parse_format("int8"))
    assert scale[:, 0].isnan().nonzero().tolist() == [[5]]


def compare_transposed(device):
    from qat.kernels.operand_codes.transposed import transposed

    for (rows, columns), dtype in product([*SIZES, (300, 130), (0, 4)], [torch.int8, torch.uint8]):
        codes = torch.randint(-128, 128, (rows, columns)).to(dtype)
        found = transposed(codes.to(device))
        assert found.is_contiguous()
        assert torch.equal(found.cpu(), reference.transposed(codes))


def compare_noise(device):
    """Uniform, and without relation between neighbours, rows and seeds."""
    draws = [noise_of(torch.tensor([seed], device=device), 64, 1024, device) for seed in (0, 1, 2**61)]
    for noise in draws:
        assert 0 < noise.min() < 1e-3 < 1 - 1e-3 < noise.max() < 1
        counts = torch.histc(noise, 64, 0, 1)
        assert ((counts - 1024) / 32).square().mean() < 2
    pairs = [
        (draws[0], draws[1]),
        (draws[1], draws[2]),
        (draws[0][:, 1:], draws[0][:, :-1]),
        (draws[0][1:], draws[0][:-1]),
    ]
    pairs += [(draws[0][:, step:], draws[0][:, :-step]) for step in (2, 4, 8)]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02


def compare_layers(device):
    """A layer that takes codes from the kernels computes what one does that takes them from PyTorch."""
    from tests.nn.test_low_bit_linear import BACKWARD, gradients, layer_of

    launched, before = [], dispatch.runs_triton
    for name in BACKWARD:
        torch.manual_seed(0)
        layer, x, g = layer_of(BACKWARD[name], 32, 24).to(device), torch.randn(3, 9, 32), torch.randn(3, 9, 24)
        layer.how = layer.how._replace(grad=layer.how.grad._replace(stochastic=False))
        dispatch.runs_triton = lambda _: launched.append(1) or True
        y, found = gradients(layer, x.to(device), g.to(device))
        dispatch.runs_triton = lambda _: False
        expected_y, expected = gradients(layer, x.to(device), g.to(device))
        dispatch.runs_triton = before
        assert launched
        torch.testing.assert_close(y, expected_y)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


def same(found, expected, what):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b), what


CHECKS = [compare_spoilt, compare_transposed, compare_noise, compare_layers]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "call",
    ["compare('cpu')", "compare('cpu', sizes=[(3, 72)], most=16)", *(f"{check.__name__}('cpu')" for check in CHECKS)],
)
def test_triton_in_the_interpreter_equals_the_reference(call):
    code = f"from tests.kernels.test_operand_codes import *; {call}"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_triton_equals_the_reference(name):
    compare("cuda", [name], [*SIZES, (1000, 512), (2, 20_000)])


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_triton_on_the_gpu(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("transpose", [False, True])
def test_a_seed_repeats_gradients_on_the_gpu_and_nobody_waits(transpose):
    g, factor = torch.randn(300, 200, device="cuda").bfloat16(), torch.ones(1, 1, device="cuda")
    arguments = g, factor, parse_format("fp8_e5m2"), PerToken(), torch.float32, True, transpose
    product_ops.gradient_codes(*arguments)  # compiles
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        torch.cuda.set_sync_debug_mode("error")
        draws.append(product_ops.gradient_codes(*arguments)[0])
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("operator", ["row_codes", "column_codes"])
def test_gradients_are_rounded_to_a_neighbour_and_without_bias(name, operator):
    """The operators, with the noise of the reference."""
    format, factor, draws = parse_format(name), torch.rand(1, 1) + 0.5, 600
    x = torch.randn(8, 16)
    scaled = (x * factor) if operator == "row_codes" else (x * factor).T
    found = []
    for seed in range(draws):
        codes, scale = getattr(torch.ops.qat, operator)(x, factor, torch.tensor([seed]), torch.float32, name)
        found.append(format.decode(codes) * scale)
        ends = [format.encode(scaled / scale, None, torch.full_like(scaled, noise)) for noise in (0.0, 1 - 2**-24)]
        assert ((codes == ends[0]) | (codes == ends[1])).all()
    values = torch.stack(found)
    gap = (format.decode(ends[1]) - format.decode(ends[0])).abs() * scale
    # A draw is off by half the gap at most, as a standard deviation.
    assert ((values.mean(0) - scaled).abs() <= 5 * gap / 2 / draws**0.5 + 1e-6).all()


def test_operators_are_well_formed_and_trace():
    x, seed, checks = torch.randn(6, 20), torch.tensor([3]), ("test_schema", "test_faketensor")
    grid = torch.bfloat16, "int8"
    torch.library.opcheck(torch.ops.qat.row_codes, (x, None, None, *grid), test_utils=checks)
    torch.library.opcheck(torch.ops.qat.row_codes, (x, torch.rand(1, 20), seed, *grid), test_utils=checks)
    torch.library.opcheck(torch.ops.qat.column_codes, (x, torch.rand(6, 1), seed, *grid), test_utils=checks)
    codes = torch.ops.qat.row_codes(x, None, None, *grid)[0]
    torch.library.opcheck(torch.ops.qat.transposed_codes, (codes,), test_utils=checks)


def test_no_gradients_and_one_row():
    for rows, columns in [(0, 4), (1, 4)]:
        x, factor = torch.randn(rows, columns), torch.ones(rows, 1)
        codes, scale = torch.ops.qat.column_codes(x, factor, None, torch.float32, "int8")
        assert (codes.shape, scale.shape) == ((columns, rows), (columns, 1))
