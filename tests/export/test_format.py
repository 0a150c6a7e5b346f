"""docs/format.md is enough to read an artifact: here by its words alone, without this project."""

import json
import struct
from functools import partial
from math import prod

import ml_dtypes
import numpy as np
import pytest
import torch

import qat
from qat.quantizers import (
    KMeansQuantizer,
    LSQQuantizer,
    MicroscalingQuantizer,
    MinMaxQuantizer,
    NVFP4Quantizer,
    TableQuantizer,
    VectorQuantizer,
)
from tests.export.exported import converted

GRIDS = {
    "int3": partial(LSQQuantizer, bits=3, granularity="per_group_32"),
    "uint4": partial(MinMaxQuantizer, bits=4, granularity="per_channel", symmetric=False),
    "tiles": partial(MinMaxQuantizer, bits=8, granularity="per_block_16x32"),
    "levels": partial(LSQQuantizer, bits=2, granularity="per_flat_group_64", grid="ternary"),
    "a table for each row": partial(KMeansQuantizer, bits=3),
    "a table for each group": partial(KMeansQuantizer, bits=2, granularity="per_group_32"),
    "one table": partial(TableQuantizer, bits=4),
    "quantized scales": partial(TableQuantizer, bits=4, granularity="per_flat_group_64", double_quant=True),
    "pairs": partial(VectorQuantizer, bits=2),
    "mxfp4": partial(MicroscalingQuantizer, format="fp4_e2m1"),
    "nvfp4": NVFP4Quantizer,
}
LAYER = "model.layers.0.self_attn.k_proj"
DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "U8": np.uint8, "I32": np.int32,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = {
    "fp4_e2m1": np.concatenate([FP4, -FP4]),
    "fp8_e4m3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
}


def tensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    found = {}
    for name, entry in header.items():
        first, last = (8 + length + place for place in entry["data_offsets"])
        found[name] = np.frombuffer(data[first:last], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def unpacked(packed, bits, count):
    numbers = [int.from_bytes(packed[at : at + bits].tobytes(), "little") for at in range(0, len(packed), bits)]
    return np.array([number >> bits * i & 2**bits - 1 for number in numbers for i in range(8)][:count])


def sizes_of(name):
    return [int(number) for number in "".join(c if c.isdigit() else " " for c in name).split()]


def bits_of(format):
    if format.startswith("fp"):
        return sizes_of(format)[0]
    size = sizes_of(format)[0]
    return size if format.lstrip("u").startswith("int") else (size - 1).bit_length()


def groups_of(granularity, shape):
    """The number of each weight's group."""
    rows, columns = shape
    row, column = np.indices(shape)
    sizes = sizes_of(granularity)
    if granularity.startswith("per_flat_group"):
        return np.arange(rows * columns).reshape(shape) // sizes[0]
    if granularity.startswith("per_group"):
        return row * (columns // sizes[0]) + column // sizes[0]
    if granularity.startswith("per_block"):
        return row // sizes[0] * (columns // sizes[1]) + column // sizes[1]
    return row if granularity in ("per_channel", "per_token") else np.zeros(shape, int)


def decoded(found, name, description):
    """The values of the weight `name`, float32, before they are rounded to its dtype."""
    format, shape = description["format"], [1, *description["shape"]][-2:]
    block = sizes_of(format)[1] if format.startswith("vector") else 1
    codes = unpacked(found[f"{name}.codes"], bits_of(format), prod(shape) // block).reshape(shape[0], -1)
    group = groups_of(description["granularity"], shape)
    if "format" in description["scale"]:
        scale = decoded(found, f"{name}.scale", description["scale"]).reshape(-1)
    else:
        scale = found[f"{name}.scale"].astype(np.float32).reshape(-1)
    if format.startswith(("codebook", "vector")):
        table = found[f"{name}.codebook"].astype(np.float32)
        table = table.reshape(-1, table.shape[-1])
        row = group * len(table) // len(scale)
        entry = (codes[..., None] * block + np.arange(block)).reshape(shape)
        values = table[row, entry]
    elif format.startswith("levels"):
        values = codes - np.float32((sizes_of(format)[0] - 1) / 2)
    elif format.startswith("fp"):
        values = VALUES[format][codes]
    else:
        values = codes - (2 ** (bits_of(format) - 1) if format.startswith("int") else 0)
    values = values.astype(np.float32)
    if f"{name}.zero_point" in found:
        values = values - found[f"{name}.zero_point"].reshape(-1)[group]
    values = values * scale[group]
    return values + found[f"{name}.offset"] if f"{name}.offset" in found else values


@pytest.mark.parametrize("grid", GRIDS)
def test_the_words_are_enough(grid, tmp_path):
    model = converted("llama, tied", GRIDS[grid])
    folder = qat.save(model, tmp_path / "a")
    settings = json.loads((folder / "quant_config.json").read_text())
    description = settings["layers"][LAYER]["weights"]["weight"]
    values = decoded(tensors(folder / "model.safetensors"), f"{LAYER}.weight", description)
    expected = model.get_submodule(LAYER).weight.dequantize()
    assert torch.equal(torch.from_numpy(values), expected)
