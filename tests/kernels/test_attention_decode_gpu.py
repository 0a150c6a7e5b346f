"""Attention to a quantized cache on a GPU: sizes, masks, the same bits in every run, compilers, graphs, generation."""

import pytest
import torch

from qat.kernels import dispatch
from qat.kernels.attention_decode.ops import MOST_ROWS, attention_decode
from tests.kernels.attention_decode.tokens import LAYOUTS, case, defined, padded
from tests.nn.kv_models import quantized, tokens

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3}
BITS = ("2", "4", "8")


def made(layout, dtype=torch.bfloat16, **sizes):
    return case(layout, dtype=dtype, device="cuda", **sizes)


def check(q, keys, values, mask=None, scaling=0.2):
    found, exact = attention_decode(q, keys, values, mask, scaling), defined(q, keys, values, mask, scaling)
    assert found.dtype == q.dtype
    error = (found.double() - exact).norm() / exact.norm()
    assert error < TOLERANCE[q.dtype], float(error)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, dtype):
    check(*made(layout, dtype, length=1000))


@pytest.mark.parametrize("layout", ["2", "4", "8", "kivi"])
@pytest.mark.parametrize("length", [65, 127, 128, 129, 1023, 4097, 33333])
def test_odd_lengths(layout, length):
    check(*made(layout, length=length, batch=1))


@pytest.mark.parametrize("layout", [*BITS, "kivi"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_sizes_of_heads(layout, head_dim):
    check(*made(layout, length=777, head_dim=head_dim))


@pytest.mark.parametrize("layout", BITS)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (16, 2), (32, 1)], ids=str)
def test_groups_of_heads(layout, heads):
    check(*made(layout, length=777, heads=heads))


@pytest.mark.parametrize("queries", [2, 3, 8])
@pytest.mark.parametrize("mask", [False, True])
def test_a_few_queries(queries, mask):
    q, keys, values = made("4", length=500, queries=queries)
    check(q, keys, values, padded(2, queries, 500, device="cuda") if mask else None)


def test_more_rows_than_kernels_take_are_computed_too():
    q, keys, values = made("4", length=100, heads=(2 * MOST_ROWS, 1))
    check(q, keys, values)


@pytest.mark.parametrize("layout", ["4", "kivi"])
@pytest.mark.parametrize("kind", ["bool", "add"])
def test_masks(layout, kind):
    q, keys, values = made(layout, length=600)
    mask = padded(2, 1, 600, padding=(0, 450), device="cuda")
    if kind == "add":
        mask = torch.zeros(mask.shape, device="cuda", dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    check(q, keys, values, mask)


def test_a_query_that_sees_nothing_gets_zeros():
    q, keys, values = made("4", length=300)
    out = attention_decode(q, keys, values, padded(2, 1, 300, padding=(300, 0), device="cuda"))
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_q_need_not_be_contiguous():
    q, keys, values = made("4", length=300, queries=2)
    wide = torch.randn(2, 2, 4, 70, device="cuda").to(q.dtype)
    wide[..., 3:67] = q.transpose(1, 2)
    own = wide[..., 3:67].transpose(1, 2)
    assert torch.equal(attention_decode(own, keys, values), attention_decode(q, keys, values))


@pytest.mark.parametrize("layout", [*BITS, "kivi"])
def test_every_element_is_written_and_twice_the_same(layout, monkeypatch):
    """Memory that is not written shows, because all of it is NaN before."""
    empty = torch.empty

    def poisoned(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    q, keys, values = made(layout, length=5000, heads=(8, 2))
    monkeypatch.setattr(torch, "empty", poisoned)
    first = check(q, keys, values)
    for _ in range(5):
        assert torch.equal(attention_decode(q, keys, values), first)


def test_no_call_waits_for_the_gpu():
    q, keys, values = made("4", length=900)
    attention_decode(q, keys, values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_decode(q, keys, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_repeats_it():
    q, keys, values = made("4", length=900)
    expected = attention_decode(q, keys, values)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = attention_decode(q, keys, values)
    graph.replay()
    assert torch.equal(out, expected)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, attention_decode(q, keys, values))


def test_a_compiler_takes_it_whole():
    q, keys, values = made("4", length=900)
    compiled = torch.compile(lambda q: attention_decode(q, keys, values) * 2, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q), attention_decode(q, keys, values) * 2)


@pytest.mark.parametrize("layout", ["int8", "int4", "int2", "kivi4_window8"])
def test_a_model_generates(layout):
    """Greedy tokens, with left padding, of float16 logits that lie apart: as the references choose them."""
    model = quantized(layout).half().cuda()
    ids = tokens(length=15).cuda()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, **options)
    with dispatch.reference_kernels():
        expected = model.generate(ids, **options)
    for own, other in zip(found.logits, expected.logits, strict=True):
        same = own.argmax(-1) == other.argmax(-1)
        apart = other.topk(2).values.diff().abs().squeeze(-1) > 0.05
        assert (same | ~apart).all()
        if not same.all():
            break  # another token leads to another text
        torch.testing.assert_close(own, other, rtol=5e-2, atol=5e-2)
