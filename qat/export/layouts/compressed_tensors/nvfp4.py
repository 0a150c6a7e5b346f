"""NVFP4: blocks of 16 fp4_e2m1 numbers with an fp8_e4m3 scale, and a float32 scale for the tensor (arXiv 2509.25149).

For a layer `[out, in]`:

    weight_packed        uint8 [out, in / 2]            codes from the low bits on
    weight_scale         float8_e4m3fn [out, in / 16]
    weight_global_scale  float32 [1]                    what block scales are divided by

The trained scale of the tensor t multiplies block scales, the stored one g divides them, and not every t has a g for
which both give the same float32 numbers. What has to be the same are the values of codes, in bfloat16, to which the
library dequantizes: g is searched for among the floats around 1 / t until they are. So is t where a checkpoint of
another tool is read.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments
from qat.export.layouts.compressed_tensors.floats import E4M3
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.microscaling import packed_rows, unpacked_rows
from qat.export.layouts.compressed_tensors.store import Store
from qat.numerics.formats import FloatFormat
from qat.numerics.granularity import PerGroup, PerTensor
from qat.numerics.qtensor import QParams, QuantizedTensor

BLOCK = 16
GRID = FloatFormat(2, 1)
# What a config says of a layer's trained scale, where that does not follow from the stored one.
TRAINED_SCALE = "tensor_scale"
# Floats on either side of the inverse that are tried. Of 20 000 random scales two needed a neighbour, and one had no
# inverse: where values lie in the middle of two bfloat16 numbers, rounding can demand more than one of them and less.
_NEIGHBOURS = 4

Scaled = Callable[[Tensor, Tensor], Tensor]


class NvFp4(Store):
    """fp4_e2m1 with scales of two levels."""

    format = "nvfp4-pack-quantized"

    def misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        scale = weight.scale
        if weight.granularity != PerGroup(BLOCK):
            yield Misfit(f"scales {weight.granularity}", f"scheme.weight.granularity=per_group_{BLOCK}")
        if (
            not isinstance(scale, WeightGrid)
            or (scale.format, scale.granularity) != (E4M3, PerTensor())
            or scale.offset
        ):
            yield Misfit("scales that are not fp8_e4m3 with one for the tensor", "quantizer@scheme.weight=nvfp4")
        if weight.dtype != torch.bfloat16:
            yield Misfit("values that are not bfloat16, which they become when they are read", "model.dtype=bfloat16")

    def arguments(self, weight: WeightGrid) -> Arguments:
        return Arguments("float", 4, "tensor_group", BLOCK, scale_dtype="torch.float8_e4m3fn")

    def tensors(self, q: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        scale = _of_blocks(q)
        yield "weight_packed", packed_rows(q)
        yield "weight_scale", scale.codes.view(torch.float8_e4m3fn)
        yield "weight_global_scale", global_scale(q, "A layer")

    def restore(self, leaves: Leaves, said: Arguments, dtype: torch.dtype) -> QuantizedTensor:
        name = leaves.name
        if (said.type, said.num_bits, said.group_size) != ("float", 4, BLOCK) or not said.symmetric:
            raise InputError(f"{name} is {self.format}, and its config.json says something else of its grid.")
        codes = unpacked_rows(leaves, GRID)
        shape = PerGroup(BLOCK).param_shape(codes.shape)
        blocks = leaves.take("weight_scale", torch.float8_e4m3fn, shape=shape).view(torch.uint8)
        if blocks.numel() and not (blocks.amin() > 0 and blocks.amax() <= E4M3.highest):
            raise InputError(f"{name} has scales that are not positive numbers.")
        stored = leaves.take("weight_global_scale", torch.float32, shape=(1,))
        found = tensor_scale(stored, blocks, name)
        if TRAINED_SCALE in leaves:
            trained = leaves.take(TRAINED_SCALE, torch.float32, shape=(1, 1))
            found = _checked(trained, stored, blocks, name)
        scale = QuantizedTensor(blocks, QParams(found), E4M3, PerTensor(), torch.float32)
        return QuantizedTensor(codes, QParams(scale), GRID, PerGroup(BLOCK), dtype)


def global_scale(q: QuantizedTensor, name: str) -> Tensor:
    """The number `[1]` that divides block scales, with which every code has the value that it has in `q`.

    Raises:
        InputError: if there is none.
    """
    scale = _of_blocks(q)
    assert isinstance(scale.qparams.scale, Tensor)
    return _inverse(scale.qparams.scale.reshape(1), scale.codes, torch.mul, torch.div, name)


def tensor_scale(stored: Tensor, blocks: Tensor, name: str) -> Tensor:
    """The number `[1, 1]` by which block scales, codes `blocks`, are multiplied; the inverse of `global_scale`.

    Raises:
        InputError: if there is none.
    """
    if not 0 < float(stored) < math.inf:
        raise InputError(f"{name} has the global scale {float(stored)}, which is no positive number.")
    return _inverse(stored, blocks, torch.div, torch.mul, name).reshape(1, 1)


def not_recovered(q: QuantizedTensor, name: str) -> float | None:
    """The trained scale of the tensor, if `tensor_scale` finds another one from the stored number.

    Raises:
        InputError: if nothing stored gives the same values.
    """
    blocks = _of_blocks(q)
    assert isinstance(blocks.qparams.scale, Tensor)
    trained = blocks.qparams.scale.reshape(1, 1)
    return None if torch.equal(tensor_scale(global_scale(q, name), blocks.codes, name), trained) else float(trained)


def _checked(trained: Tensor, stored: Tensor, blocks: Tensor, name: str) -> Tensor:
    """`trained`, which must give the values that `stored` gives."""
    present = E4M3.decode(blocks.unique())[:, None]
    if not torch.equal(_values(present * trained), _values(present / stored)):
        raise InputError(f"{name}: its tensor scale in config.json and its weight_global_scale disagree.")
    return trained


def _of_blocks(q: QuantizedTensor) -> QuantizedTensor:
    assert isinstance(q.qparams.scale, QuantizedTensor)
    return q.qparams.scale


def _inverse(scale: Tensor, blocks: Tensor, own: Scaled, other: Scaled, name: str) -> Tensor:
    """The float32 nearest to 1 / `scale` by which `other` gives the values that `own` gives by `scale`, `[1]`."""
    present = E4M3.decode(blocks.unique())[:, None]
    wanted = _values(own(present, scale))
    nearest = (1 / scale).view(torch.int32)
    for step in sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs):
        found = (nearest + step).view(torch.float32)
        if torch.equal(_values(other(present, found)), wanted):
            return found
    raise InputError(
        f"{name} has a tensor scale for which no inverse gives the same bfloat16 values. A little more training moves "
        "it; or leave the layer out by scheme.exclude."
    )


def _values(scale: Tensor) -> Tensor:
    """What every magnitude of a block with the float32 `scale` `[n, 1]` becomes, `[n, 8]`."""
    return (GRID.decode(torch.arange(8)) * scale).to(torch.bfloat16)
