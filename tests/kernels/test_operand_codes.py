"""Codes of operands: the kernels against the reference to the bit, and gradients rounded at random without bias."""

from importlib.util import find_spec
from itertools import combinations, product

import pytest
import torch

from qat.kernels import dispatch, product_ops
from qat.kernels.operand_codes import reference
from qat.numerics.formats import parse_format
from qat.numerics.granularity import PerTensor, PerToken
from tests.kernels.interpreter import interpreted

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
    return [None, (torch.rand(n) + 0.1).unsqueeze(along), torch.full((1, 1), 0.3)]


if find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from qat.kernels.operand_codes.tiles import noise_at, noise_bits

    @triton.jit
    def _read_noise(seed, out, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
        row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        at = row[:, None] * WIDTH + column[None, :]
        for_rows, for_columns = noise_at(tl.load(seed), row, 0, columns, WIDTH)
        tl.store(out + at, (noise_bits(for_rows, 0, WIDTH) + 0.5) / 256)
        tl.store(out + ROWS * WIDTH + at, (noise_bits(for_columns, 0, WIDTH) + 0.5) / 256)


def noise_of(seed, rows, columns, device):
    """What the kernels draw for each element, `[2, rows, columns]`, read out by one of its own."""
    height, width = (max(8, 1 << (n - 1).bit_length()) for n in (rows, columns))
    out = torch.empty(2, height, width, device=device)
    _read_noise[(1,)](seed, out, columns, ROWS=height, WIDTH=width)
    return out[:, :rows, :columns].cpu()


def compare_rows(device, names=FORMATS, sizes=SIZES, most=8192):
    """`most`: elements of a row that is read once; fewer make the loop over longer rows run."""
    from qat.kernels.fake_quantize import tiles
    from qat.kernels.operand_codes import rows

    tiles.ONCE, tiles.STEP = most, min(tiles.STEP, most)
    torch.manual_seed(0)
    for name, (tall, wide), dtype in product(names, sizes, STORAGE):
        x, format = values(tall, wide), parse_format(name)
        same(rows.row_codes(x.to(device), dtype, format), reference.row_codes(x, dtype, format), (name, tall, wide))


def compare_gradients(device, names=FORMATS, sizes=SIZES):
    from qat.kernels.operand_codes import gradients

    torch.manual_seed(0)
    for name, (tall, wide), seeded, whole in product(names, sizes, [False, True], [False, True]):
        x, format, what = values(tall, wide), parse_format(name), (name, tall, wide, seeded, whole)
        seed = torch.randint(2**62, (1,), device=device) if seeded else None
        noise = noise_of(seed, tall, wide, device) if seeded else None
        dtype = STORAGE[(tall + wide) % 3]
        for across, down in product(factors(wide, 0), factors(tall, 1)):
            expected = reference.gradient_codes(x, across, down, noise, dtype, format, whole)
            there = (None if factor is None else factor.to(device) for factor in (across, down))
            found = gradients.gradient_codes(x.to(device), *there, seed, dtype, format, whole)
            if seeded and name.startswith("fp8"):
                nearly_same(found, expected, what)
            else:
                same(found, expected, what)


def compare_spoilt(device):
    """A training that diverges must not look healthy: NaN comes through, and reaches no other row."""
    from qat.kernels.operand_codes import gradients, rows

    x, one = values(40, 24).to(device), torch.ones(1, 1, device=device)
    x[7, 5] = float("nan")
    _, scale = rows.row_codes(x, torch.float32, parse_format("int8"))
    assert scale[:, 0].isnan().nonzero().tolist() == [[7]]
    found = gradients.gradient_codes(x, one, one, None, torch.float32, parse_format("int8"), False)
    assert found.row_scale[:, 0].isnan().nonzero().tolist() == [[7]]
    assert found.column_scale[:, 0].isnan().nonzero().tolist() == [[5]]
    for name, seed in product(FORMATS, (None, torch.tensor([1], device=device))):
        found = gradients.gradient_codes(x, one, one, seed, torch.float32, parse_format(name), True)
        assert found.row_scale.isnan().all()
        assert found.column_scale.isnan().all()


def compare_transposed(device):
    from qat.kernels.operand_codes.transposed import transposed

    for (rows, columns), dtype in product([*SIZES, (300, 130), (0, 4)], [torch.int8, torch.uint8]):
        codes = torch.randint(-128, 128, (rows, columns)).to(dtype)
        found = transposed(codes.to(device))
        assert found.is_contiguous()
        assert torch.equal(found.cpu(), reference.transposed(codes))


def compare_noise(device):
    """Uniform, and without relation between neighbours, rows, roundings and seeds."""
    seeds = [torch.tensor([seed], device=device) for seed in (0, 1, 2**61)]
    draws = [noise for seed in seeds for noise in noise_of(seed, 64, 1024, device)]
    for noise in draws:
        assert noise.unique().numel() == 256
        counts = torch.histc(noise, 64, 0, 1)
        assert ((counts - 1024) / 32).square().mean() < 2
    pairs = [*combinations(draws, 2), (draws[0][1:], draws[0][:-1])]
    pairs += [(draws[0][:, step:], draws[0][:, :-step]) for step in (1, 2, 4, 8)]
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


def nearly_same(found, expected, what):
    """But for a few neighbouring codes: v is rounded before noise is added, and the reference rounds their sum."""
    for a, b in zip(found[::2], expected[::2], strict=True):
        apart = (a.cpu().int() - b.int()).abs()
        assert not apart.numel() or apart.max() <= 1, what
        assert (apart > 0).sum() <= 1 + a.numel() / 5000, what
    same(found[1::2], expected[1::2], what)


CHECKS = [compare_spoilt, compare_transposed, compare_noise, compare_layers]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "call",
    [
        *("compare_rows('cpu')", "compare_rows('cpu', sizes=[(3, 72)], most=16)", "compare_gradients('cpu')"),
        *(f"{check.__name__}('cpu')" for check in CHECKS),
    ],
)
def test_triton_in_the_interpreter_equals_the_reference(call):
    interpreted(__name__, call)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("check", [compare_rows, compare_gradients])
def test_triton_equals_the_reference(check, name):
    check("cuda", [name], [*SIZES, (1000, 512), (2, 20_000)])


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_triton_on_the_gpu(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1, 4, 8])
def test_noise_depends_on_the_place_alone(shift):
    """And not on where the tensor begins in memory, by which Triton cuts it."""
    from qat.kernels.operand_codes.gradients import gradient_codes

    memory, one = torch.randn(64 * 512 + 8, device="cuda").bfloat16(), torch.ones(1, 1, device="cuda")
    g, seed = memory[shift : shift + 64 * 512].view(64, 512), torch.tensor([5], device="cuda")
    found, expected = (
        gradient_codes(x, one, one, seed, torch.float32, parse_format("fp8_e5m2"), False) for x in (g, g.clone())
    )
    nearly_same(found, [part.cpu() for part in expected], shift)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [40, 64])
def test_kernels_round_to_within_the_eight_bits_of_their_noise(name, columns):
    """The mean over many draws is off by 1/512 of a gap and by what their number leaves to chance."""
    from qat.kernels.operand_codes.gradients import gradient_codes

    format, one, draws = parse_format(name), torch.ones(1, 1, device="cuda"), 4000
    g = torch.randn(32, columns, device="cuda").bfloat16()
    total = torch.zeros(2, 32, columns, dtype=torch.float64, device="cuda")
    for draw in range(draws):
        seed = torch.tensor([draw], device="cuda")
        found = gradient_codes(g, one, one, seed, torch.float32, format, False)
        total[0] += format.decode(found.row_codes) * found.row_scale
        total[1] += (format.decode(found.column_codes) * found.column_scale).T
    for mean, scale in zip(total / draws, (found.row_scale, found.column_scale.T), strict=True):
        below, above = (
            format.decode(format.encode(g.float() / scale, None, torch.full_like(g, noise, dtype=torch.float32)))
            for noise in (0.0, 1 - 2**-24)
        )
        gap = (above - below).abs() * scale
        assert ((mean - g).abs() <= gap / 512 + 5 * gap / 2 / draws**0.5 + 1e-5 * scale).all()


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", [PerToken(), PerTensor()])
def test_a_seed_repeats_gradients_on_the_gpu_and_nobody_waits(granularity):
    g, one = torch.randn(300, 200, device="cuda").bfloat16(), torch.ones(1, 1, device="cuda")
    arguments = g, one, one, parse_format("fp8_e5m2"), granularity, torch.float32, True
    product_ops.gradient_codes(*arguments)  # compiles
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        torch.cuda.set_sync_debug_mode("error")
        draws.append(product_ops.gradient_codes(*arguments))
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(*draws[:2], strict=True))
    for codes in (0, 2):
        assert not torch.equal(draws[0][codes], draws[2][codes])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_are_rounded_to_a_neighbour_and_without_bias(name, whole):
    """The operator, with the noise of the reference."""
    format, factor, draws = parse_format(name), torch.rand(1, 1) + 0.5, 600
    x, columns = torch.randn(8, 16), torch.rand(8, 1) + 0.5
    found = [
        torch.ops.qat.gradient_codes(x, factor, columns, torch.tensor([seed]), torch.float32, name, whole)
        for seed in range(draws)
    ]
    for along, scaled in ((0, x * factor), (2, (x * columns).T)):
        scale = found[0][along + 1]
        ends = [format.encode(scaled / scale, None, torch.full_like(scaled, noise)) for noise in (0.0, 1 - 2**-24)]
        assert all(((codes[along] == ends[0]) | (codes[along] == ends[1])).all() for codes in found)
        mean = torch.stack([format.decode(codes[along]) * scale for codes in found]).mean(0)
        gap = (format.decode(ends[1]) - format.decode(ends[0])).abs() * scale
        # A draw is off by half the gap at most, as a standard deviation.
        assert ((mean - scaled).abs() <= 5 * gap / 2 / draws**0.5 + 1e-6).all()


def test_operators_are_well_formed_and_trace():
    x, seed, checks = torch.randn(6, 20), torch.tensor([3]), {"test_utils": ("test_schema", "test_faketensor")}
    grid = torch.bfloat16, "int8"
    torch.library.opcheck(torch.ops.qat.row_codes, (x, *grid), **checks)
    for across, down, whole in product((None, torch.rand(1, 20)), (None, torch.rand(6, 1)), (False, True)):
        torch.library.opcheck(torch.ops.qat.gradient_codes, (x, across, down, seed, *grid, whole), **checks)
    codes = torch.ops.qat.row_codes(x, *grid)[0]
    torch.library.opcheck(torch.ops.qat.transposed_codes, (codes,), **checks)


def test_no_gradients_and_one_row():
    for rows, columns in [(0, 4), (1, 4)]:
        x, factor = torch.randn(rows, columns), torch.ones(1, 1)
        found = torch.ops.qat.gradient_codes(x, factor, factor, None, torch.float32, "int8", False)
        shapes = [(rows, columns), (rows, 1), (columns, rows), (columns, 1)]
        assert [tuple(part.shape) for part in found] == shapes
