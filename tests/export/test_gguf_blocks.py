"""Blocks of GGUF against the package `gguf`, which llama.cpp keeps: the same bytes, the same values to the bit."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from qat.errors import InputError
from qat.export.gguf.blocks import BLOCK_TYPES, holder
from qat.export.grids import WeightGrid
from qat.numerics.granularity import PerGroup
from qat.numerics.qtensor import QParams, QuantizedTensor

ROWS, BLOCKS = 8, 3
# The code that the package takes for the scale of a block, and others that are nearer to zero.
EXTREMES = {"Q4_0": -8, "Q5_0": -16, "Q8_0": 127, "TQ1_0": 0, "TQ2_0": 0, "MXFP4": 7}
NEGATIVE_ZERO = 8
LARGEST_EXPONENT = 253  # six times the power of two of the next one is beyond float32


def random_blocks(name, scale=None):
    """A matrix on the grid of a type: every code, and every float16 or exponent that scales have."""
    block, generator = BLOCK_TYPES[name], torch.Generator().manual_seed(0)
    low, high = block.format.code_range
    shape = (ROWS, BLOCKS * block.size)
    codes = torch.randint(low, high + 1, shape, generator=generator).to(block.format.code_dtype)
    groups = (ROWS, BLOCKS)
    if block.scale_dtype == torch.float16:
        scale = torch.randn(groups, generator=generator).half() if scale is None else scale
    else:
        exponents = torch.randint(0, LARGEST_EXPONENT, groups, generator=generator, dtype=torch.uint8)
        scale = exponents.view(block.scale_dtype)
    offset = torch.randn(groups, generator=generator).half() if "offset" in block.fields else None
    codebook = None if block.table is None else torch.tensor([block.table], dtype=torch.float32)
    return QuantizedTensor(
        codes, QParams(scale, None, codebook, offset), block.format, PerGroup(block.size), torch.float32
    )


def decoded(name, data):
    """What the package makes of bytes."""
    return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_are_those_of_the_package(name):
    q = random_blocks(name)
    values = decoded(name, BLOCK_TYPES[name].to_bytes(q))
    assert values.isfinite().all()
    assert torch.equal(values, q.dequantize())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_bytes_come_back_as_the_same_codes(name):
    q = random_blocks(name)
    block = BLOCK_TYPES[name]
    data = block.to_bytes(q)
    assert data.shape == (ROWS, block.row_bytes(q.shape[1]))
    back = block.from_bytes(data, "w", torch.float32)
    assert torch.equal(back.codes, q.codes)
    assert back.codes.dtype == q.codes.dtype
    for ours, theirs in zip(q.qparams, back.qparams, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert torch.equal(block.to_bytes(back), data)


@pytest.mark.parametrize("name", EXTREMES)
def test_bytes_are_those_that_the_package_writes(name):
    """Where values lie on the grid and the largest is the end of it, its own rounding finds these codes and scales."""
    q = random_blocks(name, torch.rand(ROWS, BLOCKS).add(0.5).half())
    block = BLOCK_TYPES[name]
    codes = q.codes.view(-1, block.size)
    if name == "MXFP4":
        codes[codes == NEGATIVE_ZERO] = 0  # it writes zeros without a sign
        q.qparams.scale.view(torch.uint8).clamp_(min=2)
    else:
        ends = block.format.code_range
        codes[codes == ends[0]] += 1
    codes[:, 5] = EXTREMES[name]
    written = quantize(q.dequantize().numpy(), GGMLQuantizationType[name])
    np.testing.assert_array_equal(written, block.to_bytes(q).numpy())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_grid_is_held_by_its_type_alone(name):
    grid = WeightGrid.of(random_blocks(name))
    assert holder(grid, name if name in ("TQ1_0", "TQ2_0") else "TQ2_0").name == name


def test_bytes_that_stand_for_nothing_are_refused():
    block = BLOCK_TYPES["TQ2_0"]
    data = block.to_bytes(random_blocks("TQ2_0"))
    data[0, 0] = 0xFF  # threes, where there are 0, 1 and 2
    with pytest.raises(InputError, match=r"w is damaged.*codes that TQ2_0 does not have"):
        block.from_bytes(data, "w", torch.float32)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "MXFP4"])
def test_scales_that_are_no_numbers_are_refused(name):
    block = BLOCK_TYPES[name]
    data = block.to_bytes(random_blocks(name))
    data[1, :2] = 0xFF
    with pytest.raises(InputError, match="scales that are no numbers"):
        block.from_bytes(data, "w", torch.float32)
