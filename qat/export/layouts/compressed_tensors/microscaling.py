"""The microscaling formats: blocks of 32 floats with a power of two each (OCP Microscaling Formats 1.0).

For a layer `[out, in]`:

    weight_packed  uint8 [out, in b / 8]       mxfp4 and mxfp6: codes from the low bits on
    weight         float8_e4m3fn [out, in]     mxfp8
    weight_scale   uint8 [out, in / 32]        exponents, biased by 127

The library dequantizes them to bfloat16, which holds every product of such a code and a power of two. A model in
float32 it can therefore only read with `dequantize=True`, or `dtype=torch.bfloat16`: its layers multiply in one dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments
from qat.export.layouts.compressed_tensors.floats import E4M3, float_codes
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.store import Store
from qat.numerics.formats import FloatFormat
from qat.numerics.granularity import PerGroup
from qat.numerics.packing import pack, unpack
from qat.numerics.qtensor import QParams, QuantizedTensor

BLOCK = 32
_NAN = 255


class Microscaling(Store):
    """One of the three formats."""

    def __init__(self, format: str, grid: FloatFormat) -> None:
        self.format = format  # type: ignore[misc]
        self.grid = grid

    def misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        if weight.format != self.grid:
            yield Misfit(f"{weight.format.name} codes", f"scheme.weight.format={self.grid.name}")
        if weight.granularity != PerGroup(BLOCK):
            yield Misfit(f"scales {weight.granularity}", f"scheme.weight.granularity=per_group_{BLOCK}")

    def arguments(self, weight: WeightGrid) -> Arguments:
        return Arguments("float", self.grid.bits, "group", BLOCK, scale_dtype="torch.uint8")

    def tensors(self, q: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(q.qparams.scale, Tensor)
        if self.grid == E4M3:
            yield "weight", q.codes.view(torch.float8_e4m3fn)
        else:
            yield "weight_packed", packed_rows(q)
        yield "weight_scale", q.qparams.scale.view(torch.uint8)

    def restore(self, leaves: Leaves, said: Arguments, dtype: torch.dtype) -> QuantizedTensor:
        if (said.type, said.num_bits, said.group_size) != ("float", self.grid.bits, BLOCK) or not said.symmetric:
            raise InputError(f"{leaves.name} is {self.format}, and its config.json says something else of its grid.")
        codes = float_codes(leaves, said) if self.grid == E4M3 else unpacked_rows(leaves, self.grid)
        shape = PerGroup(BLOCK).param_shape(codes.shape)
        exponents = leaves.take("weight_scale", torch.uint8, shape=shape)
        if (exponents == _NAN).any():
            raise InputError(f"{leaves.name} has scales that are NaN.")
        scale = exponents.view(torch.float8_e8m0fnu)
        return QuantizedTensor(codes, QParams(scale), self.grid, PerGroup(BLOCK), dtype)


MXFP4 = Microscaling("mxfp4-pack-quantized", FloatFormat(2, 1))
MXFP6 = Microscaling("mxfp6-pack-quantized", FloatFormat(2, 3))
MXFP8 = Microscaling("mxfp8-quantized", E4M3)


def packed_rows(q: QuantizedTensor) -> Tensor:
    """Codes of less than a byte, `[out, in bits / 8]`."""
    return pack(q.codes, q.format).view(q.shape[0], -1)


def unpacked_rows(leaves: Leaves, format: FloatFormat) -> Tensor:
    """The inverse of `packed_rows`."""
    packed = leaves.take("weight_packed", torch.uint8)
    shape = (packed.shape[0], packed.shape[1] * 8 // format.bits)
    if packed.shape[1] * 8 % (format.bits * 8):
        raise InputError(f"{leaves.name}.weight_packed is {list(packed.shape)}, which {format.name} codes do not fill.")
    return unpack(packed.reshape(-1), format, shape)
