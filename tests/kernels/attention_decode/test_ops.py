"""The operator on a CPU: the reference equals the definition, and torch.library finds no fault."""

import pytest
import torch
from torch.nn import functional as F

from qat.kernels.attention_decode import reference
from qat.kernels.attention_decode.cached import shared_by, takes
from qat.kernels.attention_decode.ops import attention_decode
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from tests.kernels.attention_decode.tokens import LAYOUTS, case, defined, padded

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("block", [1024, 48])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, block, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", block)
    q, keys, values = case(layout, dtype=torch.float32)
    torch.testing.assert_close(attention_decode(q, keys, values).double(), defined(q, keys, values), **EXACT)


@pytest.mark.parametrize("kind", ["bool", "add"])
@pytest.mark.parametrize("queries", [1, 3])
def test_masks(kind, queries):
    q, keys, values = case("4", queries=queries, heads=(6, 2), dtype=torch.float32)
    mask = padded(2, queries, 150)
    if kind == "add":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        mask[..., 50:] += 0.3
    found = attention_decode(q, keys, values, mask, scaling=0.2)
    torch.testing.assert_close(found.double(), defined(q, keys, values, mask, scaling=0.2), **EXACT)


def test_a_query_that_sees_nothing_gets_zeros():
    q, keys, values = case("4")
    out = attention_decode(q, keys, values, padded(2, 1, 150, padding=(150, 0)))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()


def test_torch_library_finds_no_fault():
    q, keys, values = case("4", dtype=torch.float32)
    arguments = (q, padded(2, 1, 150), 0.125, *keys, *values)
    torch.library.opcheck(torch.ops.qat.attention_decode.default, arguments)


def test_a_compiler_takes_it_whole():
    q, keys, values = case("4", dtype=torch.float32)
    compiled = torch.compile(lambda q: attention_decode(q, keys, values) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), attention_decode(q, keys, values) * 2)


@pytest.mark.parametrize(
    ("format", "granularity", "head_dim", "taken"),
    [
        ("int4", "per_token", 64, True),
        ("uint2", "per_block_32x1", 128, True),
        ("uint8", "per_channel_-1", 80, True),
        ("int4", "per_tensor", 96, True),
        ("int3", "per_token", 64, False),
        ("fp8_e4m3", "per_token", 64, False),
        ("codebook16", "per_token", 64, False),
        ("levels4", "per_token", 64, False),
        ("uint2", "per_token", 24, False),
        ("int4", "per_channel", 64, False),
    ],
)
def test_which_layouts_have_kernels(format, granularity, head_dim, taken):
    assert takes(parse_format(format), parse_granularity(granularity), head_dim) is taken


def test_who_shares_a_scale():
    assert shared_by("per_token", 128) == (1, 128)
    assert shared_by("per_group_32", 128) == (1, 32)
    assert shared_by("per_block_32x1", 128) == (32, 1)
    assert shared_by("per_flat_group_32", 128) == (0, 0)


def test_full_precision_alone_is_plain_attention():
    q, keys, values = case("4", length=40, dtype=torch.float32)
    none = [own._replace(codes=own.codes[..., :0, :], tail=own.values(0, 40, torch.float32)) for own in (keys, values)]
    none = [own._replace(scale=own.scale[..., :0, :], zero_point=own.zero_point[..., :0, :]) for own in none]
    expected = F.scaled_dot_product_attention(q, none[0].tail, none[1].tail, enable_gqa=True)
    torch.testing.assert_close(attention_decode(q, *none), expected, **EXACT)
