import pytest
import torch
from torch import nn

from qat.errors import InputError
from qat.nn.kv_quantizer import Schedule, tokens_of_group
from qat.nn.kv_storage import StoredTokens, pack_rows, unpack_rows
from qat.numerics.formats import parse_format
from qat.quantizers import MinMaxQuantizer
from tests.nn.kv_models import CODEBOOK, INT2, INT4, INT4_GROUP, INT8, NF4, STATIC, kivi

FACTORIES = {
    "int8": INT8,
    "int4": INT4,
    "int2": INT2,
    "int4_group": INT4_GROUP,
    "nf4": NF4,
    "blocks": kivi(4),
    "static": STATIC,
    "codebook": CODEBOOK,
}


def stored(factory, window=0, head_dim=16):
    quantizer = factory(shape=(0, head_dim))
    if not quantizer.initialized:
        quantizer.initialize(torch.randn(1, 1, 64, head_dim))
    return StoredTokens(quantizer, Schedule(tokens_of_group(quantizer), window))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("name", FACTORIES)
def test_codes_are_those_of_the_quantizer_to_the_bit(name, window):
    """However the tokens arrive, what is stored is what quantizing them at once would give."""
    store, x = stored(FACTORIES[name], window), torch.randn(2, 3, 23, 16)
    for part in x.split([7, 5, 1, 1, 9], dim=2):
        store.append(part)
    due = store.schedule.quantized_until(23)
    at_once = store.quantizer.quantize(x[..., :due, :])
    assert store.length == 23
    assert torch.equal(store.codes(), at_once.codes)
    assert torch.equal(store.dequantize(), at_once.dequantize())
    assert torch.equal(store.dequantize(), store.quantizer(x[..., :due, :]))
    assert torch.equal(store.tail, x[..., due:, :])


def test_append_returns_what_was_quantized_before_it():
    store, x = stored(kivi(4), window=2), torch.randn(1, 2, 12, 16)
    first, second = x.split([7, 5], dim=2)
    assert torch.equal(store.append(first), first)
    both = store.append(second)
    assert torch.equal(both[..., :4, :], store.quantizer(first[..., :4, :]))
    assert torch.equal(both[..., 4:, :], x[..., 4:, :])


@pytest.mark.parametrize("window", [0, 3, 30])
def test_what_is_stored_holds_no_graph(window):
    store, x = stored(INT4, window), torch.randn(1, 2, 9, 16, requires_grad=True)
    assert store.append(x).requires_grad
    assert not store.tail.requires_grad
    assert not store.append(x.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_come_back_in_their_dtype(dtype):
    store, x = stored(INT4, window=2), torch.randn(1, 2, 9, 16, dtype=dtype)
    store.append(x)
    assert store.append(x).dtype == dtype
    assert store.tail.dtype == dtype


def test_full_precision_is_stored_as_it_is():
    store, x = StoredTokens(nn.Identity(), Schedule(0, 4)), torch.randn(1, 2, 9, 16)
    store.append(x[..., :5, :])
    assert torch.equal(store.append(x[..., 5:, :]), x)
    assert store.nbytes == x.numel() * 4


def test_a_few_tokens_in_full_precision_keep_no_long_text_alive():
    store = stored(INT4, window=2)
    store.append(torch.randn(1, 2, 500, 16))
    assert store.tail.untyped_storage().nbytes() == 2 * 2 * 16 * 4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("head_dim", [16, 10, 3])
def test_memory_is_what_arithmetic_says(bits, head_dim):
    quantizer = MinMaxQuantizer((0, head_dim), bits=bits, granularity="per_token")
    store = StoredTokens(quantizer, Schedule(1, 0))
    store.append(torch.randn(2, 3, 11, head_dim))
    bytes_of_a_token = -(-head_dim // 8) * bits + 2
    assert store.nbytes == 2 * 3 * 11 * bytes_of_a_token


def test_memory_of_blocks_with_a_window():
    """8 groups of 4 tokens are due of 37 with a window of 2: 2-bit codes, a bfloat16 scale and a zero point each."""
    store = stored(kivi(4), window=2)
    store.append(torch.randn(1, 1, 37, 16))
    assert store.nbytes == 32 * 16 * 2 // 8 + 8 * 16 * 3 + 5 * 16 * 4


@pytest.mark.parametrize("name", ["int2", "int5", "uint3", "codebook16", "int8"])
@pytest.mark.parametrize("width", [1, 7, 8, 16, 20])
def test_packing_rows_is_undone(name, width):
    format = parse_format(name)
    low, high = format.code_range
    codes = torch.randint(low, high + 1, (2, 3, 5, width)).to(format.code_dtype)
    packed = pack_rows(codes, format)
    assert packed.shape == (2, 3, 5, -(-width // 8) * format.bits)
    assert torch.equal(unpack_rows(packed, format, width), codes)


@pytest.mark.parametrize("name", ["int4", "static"])
def test_cropping_equals_never_having_seen_the_rest(name):
    store, x = stored(FACTORIES[name]), torch.randn(1, 2, 20, 16)
    store.append(x)
    store.check_crop(13)
    store.crop(13)
    assert store.length == 13
    assert torch.equal(store.dequantize(), store.quantizer(x[..., :13, :]))
    store.append(x[..., 13:, :])
    assert torch.equal(store.dequantize(), store.quantizer(x))


def test_cropping_within_the_window_and_back_to_a_boundary():
    store, x = stored(kivi(4), window=3), torch.randn(1, 2, 13, 16)
    store.append(x)
    store.crop(11)
    assert torch.equal(store.append(x[..., 11:, :])[..., 8:, :], x[..., 8:, :])
    blocks = stored(kivi(4))
    blocks.append(x)
    blocks.check_crop(8)
    blocks.crop(8)
    assert blocks.length == 8
    assert torch.equal(blocks.dequantize(), blocks.quantizer(x[..., :8, :]))


@pytest.mark.parametrize(("factory", "window", "length"), [(kivi(4), 0, 7), (kivi(4), 3, 10), (INT4, 3, 5)])
def test_cropping_what_is_gone_is_refused(factory, window, length):
    store = stored(factory, window)
    store.append(torch.randn(1, 2, 20, 16))
    with pytest.raises(InputError, match=f"cropped to {length} tokens.*layout with window 0"):
        store.check_crop(length)
