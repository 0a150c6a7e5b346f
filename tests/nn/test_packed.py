"""Rows of a packed matrix are looked up without unpacking the others."""

from functools import partial

import pytest
import torch
from torch import nn

from qat.nn import PackedTensor, packed
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer, TableQuantizer

SHAPE = (24, 96)
QUANTIZERS = {
    "per channel": partial(LSQQuantizer, bits=3, granularity="per_channel"),
    "per group": partial(MinMaxQuantizer, bits=5, symmetric=False, granularity="per_group_32"),
    "per tensor": partial(MinMaxQuantizer, bits=4, granularity="per_tensor"),
    "per column": partial(MinMaxQuantizer, bits=4, granularity="per_channel_-1"),
    "codebook for each row": partial(KMeansQuantizer, bits=2, granularity="per_group_32", codebook="per_channel"),
    "one codebook": partial(KMeansQuantizer, bits=4, granularity="per_group_32", codebook="per_tensor"),
    "double quantization": partial(TableQuantizer, granularity="per_group_32", double_quant=True),
}
CROSSING = {
    "blocks": partial(MinMaxQuantizer, bits=4, granularity="per_block_8x16"),
    "flat groups": partial(MinMaxQuantizer, bits=4, granularity="per_flat_group_64"),
}


def packed_by(factory, shape=SHAPE):
    weight = torch.randn(shape)
    quantizer = factory(shape=shape)
    quantizer.initialize(weight)
    return PackedTensor.from_quantized(quantizer.quantize(weight))


@pytest.mark.parametrize("factory", (QUANTIZERS | CROSSING).values(), ids=QUANTIZERS | CROSSING)
@pytest.mark.parametrize("rows", [[3], [23, 0, 3, 3], list(range(24)), []], ids=["one", "some", "all", "none"])
def test_rows_are_those_of_the_whole(factory, rows):
    tensor = packed_by(factory)
    assert torch.equal(tensor.dequantize_rows(torch.tensor(rows, dtype=torch.long)), tensor.dequantize()[rows])


def test_rows_that_do_not_fill_bytes():
    tensor = packed_by(QUANTIZERS["per channel"], (24, 13))
    assert torch.equal(tensor.dequantize_rows(torch.tensor([5, 23])), tensor.dequantize()[[5, 23]])


@pytest.mark.parametrize("factory", QUANTIZERS.values(), ids=QUANTIZERS)
def test_only_the_rows_are_unpacked(factory, monkeypatch):
    shapes = []

    def watched(codes, format, shape):
        shapes.append(tuple(shape))
        return unpack(codes, format, shape)

    tensor, unpack = packed_by(factory), packed.unpack
    monkeypatch.setattr(packed, "unpack", watched)
    tensor.dequantize_rows(torch.tensor([1, 2]))
    assert (2, 96) in shapes
    assert SHAPE not in shapes


def test_a_row_that_is_not_there_is_an_error():
    tensor = packed_by(QUANTIZERS["per channel"])
    for row in (-1, 24):
        with pytest.raises((IndexError, RuntimeError)):
            tensor.dequantize_rows(torch.tensor([row]))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factory", QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_cast_model_keeps_the_grid(factory, cast):
    """A weight that is cast is rounded once, from the values that trained; scales and codebooks are not rounded."""
    tensor = packed_by(factory)
    values, stored = tensor.dequantize(), {name: t.clone() for name, t in tensor.state_dict().items()}
    nn.Sequential(tensor).to(cast)
    assert tensor.dtype == cast
    assert tensor.description["dtype"] == str(cast).removeprefix("torch.")
    assert torch.equal(tensor.dequantize(), values.to(cast))
    assert torch.equal(tensor.dequantize_rows(torch.tensor([5, 2])), values.to(cast)[[5, 2]])
    assert all(
        torch.equal(t, stored[name]) and t.dtype == stored[name].dtype for name, t in tensor.state_dict().items()
    )
    tensor.float()
    assert torch.equal(tensor.dequantize(), values)


def test_a_model_that_moves_takes_its_packed_tensors_along():
    tensor = packed_by(QUANTIZERS["double quantization"])
    dtypes = {name: t.dtype for name, t in tensor.state_dict().items()}
    tensor.to("meta", torch.bfloat16)
    assert (tensor.device.type, tensor.dtype) == ("meta", torch.bfloat16)
    assert {name: t.dtype for name, t in tensor.state_dict().items()} == dtypes
    assert all(t.is_meta for t in tensor.state_dict().values())


TILED = {name: QUANTIZERS[name] for name in ("per channel", "per tensor", "codebook for each row", "one codebook")}


@pytest.mark.parametrize("factory", TILED.values(), ids=TILED)
@pytest.mark.parametrize("shape", [SHAPE, (37, 32)], ids=str)
def test_tile_order_and_back(factory, shape):
    """Values, rows and the state dict are the same; codes are stored once."""
    tensor, before = packed_by(factory, shape), packed_by(factory, shape)
    before.load_state_dict(tensor.state_dict())
    assert tensor.tiled() is tensor.tiled()
    assert tensor.codes.numel() == 0
    assert tensor.memory != before.memory
    assert torch.equal(tensor.dequantize(), before.dequantize())
    rows = torch.tensor([5, 23, 5, 0])
    assert torch.equal(tensor.dequantize_rows(rows), before.dequantize()[rows])
    tiled = tensor.tiled()
    found = tensor.state_dict()
    assert found.keys() == before.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in before.state_dict().items())
    assert tensor.tiled() is tiled  # a recorded graph may read it
    assert tensor.to(tensor.device).tiled() is tiled
    tensor.tiled()
    assert torch.equal(tensor.to(torch.bfloat16).codes, before.codes)
    tensor.tiled()
    tensor.load_state_dict(before.state_dict())
    assert torch.equal(tensor.codes, before.codes)


def test_what_has_no_tile_order_stays_as_it_is():
    tensor = packed_by(QUANTIZERS["per group"])
    assert tensor.tiled() is None
    assert tensor.codes.numel() > 0
