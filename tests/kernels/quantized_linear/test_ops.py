"""The operator of packed linear layers: values, gradients, what a compiler sees, and which kernel it would take."""

import pytest
import torch

from qat.kernels.quantized_linear import ops, reference, weight
from qat.kernels.quantized_linear.choice import MEASURED, SHARED_BYTES, choice, rule, shared_bytes
from qat.kernels.quantized_linear.launches import Dequantize, Ring, Skinny, Wide, key_of
from qat.kernels.quantized_linear.layout import GRID_TABLE, TABLE, Layout
from qat.kernels.quantized_linear.weight import codes_of, table_words, tiled
from qat.nn import PackedTensor
from qat.numerics.packing import pack
from qat.numerics.qtensor import QParams
from qat.quantizers import KMeansQuantizer
from tests.kernels.quantized_linear.weights import KINDS, ids, quantized, weight_like


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_rows_are_packed_in_blocks(monkeypatch, kind):
    monkeypatch.setattr(weight, "_CPU_BLOCK", 16 * 256)
    q = quantized(kind, (41, 256))
    assert torch.equal(weight.pack_rows(tiled(q), q.format), pack(q.codes, q.format))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_tile_order_loses_nothing(kind, scale_dtype):
    q = quantized(kind, (37, 256), scale_dtype=scale_dtype)
    own = tiled(q)
    assert torch.equal(codes_of(own, q.format), q.codes)
    torch.testing.assert_close(reference.dequantize_rows(own, 0, 37, torch.float32), q.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [256, 384])
def test_large_groups_are_taken_apart(size):
    q = quantized(("uint4", f"per_group_{size}", "zero"), (20, 768))
    own = tiled(q)
    assert own.layout.group == 128
    torch.testing.assert_close(reference.dequantize_rows(own, 0, 20, torch.float32), q.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (("int5", "per_group_64", ""), (16, 128)),
        (("int4", "per_group_16", ""), (16, 128)),
        (("int4", "per_block_16x16", ""), (16, 128)),
        (("int4", "per_channel_-1", ""), (16, 128)),
        (("fp8_e4m3", "per_channel", ""), (16, 128)),
        (("levels64", "per_channel", ""), (16, 128)),
    ],
)
def test_what_no_kernel_takes(kind, shape):
    assert tiled(quantized(kind, shape)) is None


def test_qparams_that_no_kernel_takes():
    q = quantized(("uint4", "per_group_64", "zero"), (16, 128))
    shifted = q.qparams._replace(offset=torch.zeros(1))
    for params in (shifted, q.qparams._replace(zero_point=q.qparams.zero_point + 0.5)):
        assert weight.tiled_by_rows(q.shape, params, q.format, q.granularity, lambda a, b: q.codes[a:b]) is None
    per_group = QParams(q.qparams.scale, None, torch.rand(16, 2, 16).sort().values)
    table = quantized(("codebook16", "per_group_64", "one"), (16, 128))
    assert weight.tiled_by_rows(q.shape, per_group, table.format, q.granularity, lambda a, b: table.codes[a:b]) is None


def test_kinds_of_tables():
    grid, any = (tiled(quantized(("codebook16", "per_group_64", kind), (16, 128))) for kind in ("grid", "one"))
    assert (grid.layout.kind, any.layout.kind) == (GRID_TABLE, TABLE)
    words = table_words(any.table, any.layout, torch.bfloat16)
    entries = [
        (int(words[0, i // 4]) >> 8 * (i % 4) & 255) | (int(words[0, 4 + i // 4]) >> 8 * (i % 4) & 255) << 8
        for i in range(16)
    ]
    assert torch.tensor(entries).to(torch.int16).view(torch.bfloat16).tolist() == any.table[0].bfloat16().tolist()
    assert words.shape == (8, 8)  # a copy for each g
    assert table_words(grid.table, grid.layout, torch.float16).shape == (8, 4)


@pytest.mark.parametrize("sharing", ["per_channel", "per_tensor"])
def test_learned_entries_of_seven_bits_are_decoded_as_integers(sharing):
    weight = torch.randn(16, 128)
    learned = KMeansQuantizer(weight.shape, granularity="per_group_64", codebook=sharing, entry_bits=7)
    learned.initialize(weight)
    q = learned.quantize(weight)
    packed = tiled(q)
    assert packed.layout.kind == GRID_TABLE
    x = torch.randn(3, 128)
    torch.testing.assert_close(ops.quantized_linear(x, packed), x @ q.dequantize().T)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[9], KINDS[15]], ids=ids)
@pytest.mark.parametrize("leading", [(3,), (2, 5), ()], ids=str)
def test_values_and_gradients_are_those_of_the_matrix(kind, leading, monkeypatch):
    monkeypatch.setattr(weight, "_CPU_BLOCK", 16 * 128)  # several blocks
    q = quantized(kind, (40, 128))
    x = torch.randn(*leading, 128, requires_grad=True)
    bias = torch.randn(40, requires_grad=True)
    y = ops.quantized_linear(x, tiled(q), bias)
    expected = torch.nn.functional.linear(x, q.dequantize(), bias)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, (x, bias), dy) for out in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[9], KINDS[14]], ids=ids)
def test_the_operator_is_well_declared(kind):
    own = tiled(quantized(kind, (32, 128)))
    x = torch.randn(3, 128, requires_grad=True)
    fields = own.tiles, own.scale, own.zero, own.table, None
    layout = *own.layout[:4], -1 if own.layout.center is None else own.layout.center, own.layout.group
    torch.library.opcheck(torch.ops.qat.quantized_linear.default, (x, torch.randn(32), *fields, *layout))


def test_a_compiler_sees_one_operator():
    own = tiled(quantized(KINDS[0], (32, 128)))
    compiled = torch.compile(lambda x: ops.quantized_linear(x, own), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 128)
    assert torch.equal(compiled(x), ops.quantized_linear(x, own))


def test_how_many_tokens_take_which_kernel(monkeypatch):
    layout = Layout(4096, 4096, 4, center=8, group=64)
    kinds = [type(choice(weight_like(layout), tokens)) for tokens in (1, 16, 17, 64, 256, 8192)]
    assert kinds == [Skinny, Skinny, Wide, Wide, Wide, Dequantize]
    assert isinstance(choice(weight_like(layout._replace(rows=14336)), 1), Ring)
    monkeypatch.setitem(MEASURED, key_of(weight_like(layout)), ((4, Skinny(8, 8)), (32, Wide(64, 32))))
    assert [choice(weight_like(layout), tokens) for tokens in (3, 9)] == [Skinny(8, 8), Wide(64, 32)]
    assert choice(weight_like(layout), 5) == rule(layout, 5)
    assert choice(weight_like(layout), 8192) == Dequantize()
    assert choice(weight_like(layout), 9, "NVIDIA A100") != Wide(64, 32)


def test_the_rule_uses_the_processors():
    """A few tokens of a small weight split its columns; many tokens of a large one have no need to."""
    small = choice(weight_like(Layout(4096, 4096, 4, center=8, group=64)), 64)
    assert 64 <= 4096 // small.rows * small.splits <= 264
    large = choice(weight_like(Layout(28672, 8192, 4, center=8, group=64)), 512)
    assert large.splits == 1
    assert large.rows * large.tokens >= 128 * 128


@pytest.mark.parametrize("columns", [64, 576, 1024, 4096, 14336])
@pytest.mark.parametrize("tokens", [1, 9, 33, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_what_the_rule_says_can_be_launched(columns, tokens, bits, group):
    ring = pytest.importorskip("qat.kernels.quantized_linear.ring")
    layout = Layout(96 if columns < 4096 else 32768, columns, bits, center=0, group=group)
    how = choice(weight_like(layout), tokens)
    if isinstance(how, Skinny | Ring):
        assert how.warps % how.warps_k == 0
        if isinstance(how, Ring):
            assert ring.ring_bytes(Layout(96, columns, bits, group=group), True, how) <= 44 * 1024
    elif isinstance(how, Wide):
        assert how.rows % (16 * how.warps) == 0
        assert shared_bytes(layout, how) <= SHARED_BYTES
        assert -(-columns // 256) * 4 // how.depth >= how.splits


@pytest.mark.parametrize("kind", [KINDS[0], ("codebook16", "per_group_64", "rows")], ids=ids)
def test_tiles_made_in_inference_mode_serve_training(kind):
    """Lightning validates in that mode, so the first product of a layer is often there."""
    packed = PackedTensor.from_quantized(quantized(kind, (32, 128)))
    x = torch.randn(3, 128)
    with torch.inference_mode():
        expected = ops.quantized_linear(x, packed.tiled())
        packed.tiled().words_for(torch.bfloat16)
    assert not any(tensor.is_inference() for tensor in packed.kernel_tensors())
    y = ops.quantized_linear(x.requires_grad_(), packed.tiled())
    y.sum().backward()
    assert torch.equal(y, expected)


def test_a_bias_need_not_be_contiguous():
    own, x, bias = tiled(quantized(KINDS[0], (32, 128))), torch.randn(3, 128), torch.randn(64)[::2]
    assert torch.equal(ops.quantized_linear(x, own, bias), ops.quantized_linear(x, own, bias.clone()))
