"""The kernels in Triton's interpreter equal the definition; see `test_interpreted.py`.

In float16: the interpreter has no arithmetic of bfloat16.
"""

import pytest
import torch

from qat.kernels.attention_decode import triton as kernels
from tests.kernels.attention_decode.tokens import LAYOUTS, case, defined, padded


def attended(q, keys, values, mask=None, scaling=0.3):
    return kernels.attention_decode(q, mask, scaling, keys, values)


def check(q, keys, values, mask=None, scaling=0.3):
    found, exact = attended(q, keys, values, mask, scaling), defined(q, keys, values, mask, scaling)
    assert found.dtype == q.dtype
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()))


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """Two blocks a program, so that there are several."""
    choices = {bits: own._replace(least=1, programs=6) for bits, own in kernels.CHOICES.items()}
    monkeypatch.setattr(kernels, "CHOICES", choices)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    check(*case(layout, length=230, batch=1))


@pytest.mark.parametrize("layout", ["4", "kivi"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129, 300])
def test_every_length(layout, length):
    if layout == "kivi" and length < 64:
        length += 64
    check(*case(layout, length=length, batch=1))


@pytest.mark.parametrize("bits", ["2", "4", "8"])
@pytest.mark.parametrize("head_dim", [12, 80, 96, 128])
def test_sizes_of_heads(bits, head_dim):
    check(*case(bits, length=75, head_dim=head_dim, batch=1))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 2), (16, 2), (12, 1)], ids=str)
def test_groups_of_heads(heads):
    check(*case("4", length=100, heads=heads, batch=1))


@pytest.mark.parametrize("layout", ["4", "kivi"])
@pytest.mark.parametrize("kind", ["bool", "add", "of all"])
def test_masks(layout, kind):
    q, keys, values = case(layout, length=150)
    mask = padded(2, 1, 150, padding=(0, 90))
    if kind == "of all":
        mask = mask[1:]
    if kind == "add":
        mask = torch.zeros(mask.shape, dtype=torch.float16).masked_fill(~mask, torch.finfo(torch.float16).min)
        mask[:, :, :, 100:] += 0.5
    check(q, keys, values, mask)


@pytest.mark.parametrize("mask", [False, True])
def test_a_few_queries(mask):
    q, keys, values = case("4", length=131, queries=3)
    check(q, keys, values, padded(2, 3, 131) if mask else None)


def test_a_query_that_sees_nothing_gets_zeros():
    q, keys, values = case("4", length=100)
    mask = padded(2, 1, 100, padding=(0, 100))
    out = attended(q, keys, values, mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().sum() > 0


def test_q_need_not_be_contiguous():
    q, keys, values = case("4", length=100, heads=(4, 2), queries=2)
    wide = torch.randn(2, 2, 4, 70).half()
    wide[..., 3:67] = q.transpose(1, 2)
    own = wide[..., 3:67].transpose(1, 2)
    assert torch.equal(attended(own, keys, values), attended(q, keys, values))


@pytest.mark.parametrize("layout", ["4", "kivi"])
@pytest.mark.parametrize("moved", [torch.clone, lambda x: x.mT.contiguous().mT], ids=["no room", "transposed"])
def test_codes_in_other_places(layout, moved):
    """Without room to grow, 99 scales of a head are no whole words."""
    q, keys, values = case(layout, length=99)
    names = [name for name in ("codes", "scale", "zero_point") if getattr(keys, name) is not None]
    others = [own._replace(**{name: moved(getattr(own, name)) for name in names}) for own in (keys, values)]
    assert torch.equal(attended(q, *others), attended(q, keys, values))


def test_every_element_is_written_and_twice_the_same(monkeypatch):
    """Memory that is not written shows, because all of it is NaN before."""
    empty = torch.empty

    def poisoned(*sizes, **options):
        made = empty(*sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    q, keys, values = case("4", length=300, heads=(6, 2), head_dim=80)
    check(q, keys, values)
    assert torch.equal(attended(q, keys, values), attended(q, keys, values))


@pytest.mark.parametrize("layout", ["int4", "kivi4_window8"])
def test_a_model_attends_by_the_kernels(layout, monkeypatch):
    from qat.kernels.attention_decode import ops
    from tests.nn.kv_models import in_parts, quantized, tokens

    model, ids = quantized(layout).half(), tokens(length=20)
    expected, _ = in_parts(model, ids, [17, 1, 1, 1])
    monkeypatch.setattr(ops, "_runs_triton", lambda *_: True)
    found, _ = in_parts(model, ids, [17, 1, 1, 1])
    assert not torch.equal(found, expected)  # the sums have another order
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
