"""Packed linear layers on a GPU: every kernel, odd sizes, the same bits in every run, compilers and CUDA graphs."""

import pytest
import torch

import qat
from qat.kernels import dispatch
from qat.kernels.quantized_linear import choice as choices
from qat.kernels.quantized_linear import ops
from qat.kernels.quantized_linear.launches import Choice, Dequantize, Ring, Skinny, Wide
from qat.kernels.quantized_linear.weight import tiled
from qat.nn import PackedTensor
from tests.conftest import tiny_llama
from tests.kernels.quantized_linear.weights import KINDS, ids, quantized
from tests.transforms.test_prepare import SCHEMES, tokens

pytestmark = pytest.mark.gpu

WAYS = {
    "skinny": Skinny(4, 4),
    "skinny, x ahead": Skinny(4, 2, 255, True),
    "skinny, a warp": Skinny(1, 1),
    "skinny, eight warps": Skinny(8, 8, 128),
    "ring": Ring(4, 4),
    "ring, three slots": Ring(2, 1, 168, 3),
    "wide": Wide(64, 16),
    "wide, split": Wide(64, 64, 4),
    "wide, whole steps": Wide(64, 32, depth=4),
    "wide, tall": Wide(128, 64, 2, stages=4),
    "wide, eight warps": Wide(128, 128, warps=8),
    "matrix": Dequantize(),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture
def way(monkeypatch):
    """Makes every product take one kernel."""
    return lambda how: monkeypatch.setattr(ops, "choice", lambda *_: how)


def case(kind, shape, tokens, dtype, bias=True):
    q = quantized(kind, shape, device="cuda")
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    return q, x, torch.randn(shape[0], device="cuda").to(dtype) if bias else None


def check(q, x, bias, y):
    exact = x.float() @ q.dequantize().float().T + (0 if bias is None else bias.float())
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    error = (y.float() - exact).norm() / exact.norm()
    assert error < (1e-2 if x.dtype == torch.bfloat16 else 2e-3), float(error)


@pytest.fixture(autouse=True)
def full_precision_sums():
    torch.backends.cuda.matmul.allow_tf32 = False


@DTYPES
@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_every_kind_by_every_kernel(kind, how, dtype, way):
    way(how)
    q, x, bias = case(kind, (272, 1024), 7, dtype)
    check(q, x, bias, ops.quantized_linear(x, tiled(q), bias))


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", [(1, 64), (37, 320), (250, 1600), (1000, 576)], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[5], KINDS[7], KINDS[15]], ids=ids)
def test_sizes_that_are_no_multiples(kind, shape, how, way):
    way(how)
    q, x, bias = case(kind, shape, 5, torch.bfloat16)
    check(q, x, bias, ops.quantized_linear(x, tiled(q), bias))


@pytest.mark.parametrize(
    "how", [Skinny(4, 4), Ring(4, 4), Wide(64, 16), Dequantize()], ids=lambda how: type(how).__name__
)
@pytest.mark.parametrize("columns", [33, 1001])
def test_columns_that_16_bytes_do_not_divide(columns, how, way):
    way(how)
    q, x, bias = case(("int4", "per_channel", ""), (40, columns), 3, torch.bfloat16)
    check(q, x, bias, ops.quantized_linear(x, tiled(q), bias))


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 159, 160, 300])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[14]], ids=ids)
def test_any_number_of_tokens(kind, tokens):
    q, x, bias = case(kind, (512, 2048), tokens, torch.bfloat16)
    y = ops.quantized_linear(x, tiled(q), bias)
    assert y.shape == (tokens, 512)
    if tokens:
        check(q, x, bias, y)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5], KINDS[10], KINDS[15]], ids=ids)
@pytest.mark.parametrize("how", [*choices.SHAPES, Wide(64, 64, depth=4), Wide(128, 64, 4)], ids=str)
def test_every_tile_of_many_tokens(how, kind, way):
    """More blocks of tokens than are grouped, the last of them not whole, and rows that end within a tile."""
    way(how)
    q, x, bias = case(kind, (1000, 1600), 5 * how.tokens - 3, torch.bfloat16)
    weight = tiled(q)
    first = ops.quantized_linear(x, weight, bias)
    check(q, x, bias, first)
    assert torch.equal(ops.quantized_linear(x, weight, bias), first)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_every_element_is_written_and_twice_the_same(how, way, monkeypatch):
    """Memory that is not written shows, because all of it is NaN before."""
    way(how)
    empty = torch.empty

    def poisoned(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    q, x, bias = case(KINDS[0], (1000, 1600), 13, torch.bfloat16)
    weight = tiled(q)
    first = ops.quantized_linear(x, weight, bias)
    check(q, x, bias, first)
    for _ in range(5):
        assert torch.equal(ops.quantized_linear(x, weight, bias), first)


@pytest.mark.parametrize(
    "how", [Skinny(4, 4), Ring(4, 4), Wide(64, 16), Dequantize()], ids=lambda how: type(how).__name__
)
def test_x_need_not_be_contiguous(how, way):
    way(how)
    q, _, _ = case(KINDS[0], (64, 512), 1, torch.bfloat16)
    weight, wide = tiled(q), torch.randn(512, 24, device="cuda").bfloat16()
    rows = torch.randn(6, 3 * 512, device="cuda").bfloat16()
    for x in (wide.T[3:9], rows[:, 512:1024], rows[:, 4:516], rows[::2, :512], rows.view(2, 3, 1536)[..., 8:520]):
        assert torch.equal(ops.quantized_linear(x, weight), ops.quantized_linear(x.contiguous(), weight))


def test_the_gradient_is_that_of_the_matrix():
    q, x, bias = case(KINDS[0], (640, 512), 20, torch.bfloat16)
    own, weight = x.clone().requires_grad_(), q.dequantize().bfloat16()
    dy = torch.randn(20, 640, device="cuda").bfloat16()
    (found,) = torch.autograd.grad(ops.quantized_linear(own, tiled(q), bias), own, dy)
    torch.testing.assert_close(found, dy @ weight, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_a_compiler_takes_it_whole(tokens):
    q, x, bias = case(KINDS[14], (512, 1024), tokens, torch.bfloat16)
    weight = tiled(q)
    compiled = torch.compile(lambda x: torch.relu(ops.quantized_linear(x, weight, bias)), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.relu(ops.quantized_linear(x, weight, bias)))


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_a_cuda_graph_repeats_it(tokens):
    q, x, bias = case(KINDS[0], (512, 1024), tokens, torch.bfloat16)
    weight = tiled(q)
    expected = ops.quantized_linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = ops.quantized_linear(x, weight, bias)
    graph.replay()
    assert torch.equal(y, expected)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, ops.quantized_linear(x, weight, bias))


def test_codes_are_stored_once():
    tensor = PackedTensor.from_quantized(quantized(KINDS[0], (1024, 1024), torch.bfloat16, device="cuda"))
    before, held = {name: value.cpu() for name, value in tensor.state_dict().items()}, torch.cuda.memory_allocated()
    tensor.tiled()
    assert torch.cuda.memory_allocated() <= held + 1.1 * before["scale"].nbytes
    assert tensor.codes.numel() == 0
    found = tensor.to("cpu").state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())


@pytest.mark.parametrize("scheme", ["w4a8", "kmeans"])
def test_a_converted_model_generates(scheme):
    model = qat.prepare(tiny_llama().cuda().bfloat16(), SCHEMES[scheme]).eval()
    ids = tokens().cuda()
    qat.calibrate(model, [{"input_ids": ids}])
    packed = qat.convert(model).cuda()
    with torch.no_grad():
        logits = packed(ids).logits
        with dispatch.reference_kernels():
            expected = packed(ids).logits
        torch.testing.assert_close(logits.float(), expected.float(), rtol=5e-2, atol=5e-2 * float(expected.abs().max()))
        out = packed.generate(input_ids=ids[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 12)


def test_a_layer_under_a_compiler():
    model = qat.convert(qat.prepare(tiny_llama().bfloat16(), SCHEMES["lsq"]).eval()).cuda()
    layer = next(module for module in model.modules() if type(module).__name__ == "PackedLinear")
    assert layer.weight.codes.numel() == 0  # in tile order since it was moved
    x = torch.randn(3, layer.in_features, device="cuda").bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_float32_follows_the_definition():
    q, x, _ = case(KINDS[0], (64, 512), 3, torch.float32, bias=False)
    torch.testing.assert_close(ops.quantized_linear(x, tiled(q)), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_as_a_matrix_it_is_the_definition_to_the_bit(kind):
    """Integers and entries that bfloat16 holds, times a scale, rounded once."""
    from qat.kernels.quantized_linear import reference, tiled_product

    weight = tiled(quantized(kind, (300, 640), device="cuda"))
    found = tiled_product.dequantize(weight, weight.words_for(torch.bfloat16), torch.bfloat16)
    assert torch.equal(found, reference.dequantize_rows(weight, 0, 300, torch.bfloat16))


def test_the_table_of_choices_is_one_of_kernels():
    assert all(isinstance(how, Choice) for entries in choices.MEASURED.values() for _, how in entries)
