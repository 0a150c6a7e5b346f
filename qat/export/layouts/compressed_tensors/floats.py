"""8-bit floats: `float-quantized`.

For a layer `[out, in]`:

    weight        float8_e4m3fn [out, in]
    weight_scale  [1] for the tensor, [out, 1], [out, in / g], or one a block [out / r, in / c]
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments, sharing
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.scales import DTYPES, restored, scale_misfits
from qat.export.layouts.compressed_tensors.store import Store
from qat.numerics.formats import FloatFormat
from qat.numerics.granularity import PerBlock, PerTensor
from qat.numerics.qtensor import QParams, QuantizedTensor

E4M3 = FloatFormat(4, 3)


class FloatQuantized(Store):
    """fp8_e4m3 with float scales."""

    format = "float-quantized"
    inputs = ("float",)

    def misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        if weight.format != E4M3:
            other = "quantizer@scheme.weight=fp8 scheme.weight.bits=8"
            mend = "scheme.weight.format=fp8_e4m3" if weight.format.bits == E4M3.bits else other
            yield Misfit(f"{weight.format.name} codes with float scales", mend)
        yield from scale_misfits(weight)
        if weight.group_size is None and not isinstance(weight.granularity, PerTensor | PerBlock):
            yield Misfit(f"scales {weight.granularity}", "scheme.weight.granularity=per_channel")

    def arguments(self, weight: WeightGrid) -> Arguments:
        return Arguments("float", 8, **sharing(weight.granularity))

    def tensors(self, q: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(q.qparams.scale, Tensor)
        yield "weight", q.codes.view(torch.float8_e4m3fn)
        shape = (1,) if isinstance(q.granularity, PerTensor) else (-1, _scales_of_a_row(q))
        yield "weight_scale", q.qparams.scale.reshape(shape).to(q.dtype)

    def restore(self, leaves: Leaves, said: Arguments, dtype: torch.dtype) -> QuantizedTensor:
        granularity = said.granularity(leaves.name)
        codes = float_codes(leaves, said)
        shape = granularity.param_shape(codes.shape)
        stored = (1,) if isinstance(granularity, PerTensor) else shape
        scale = restored(leaves.take("weight_scale", *DTYPES, shape=stored), dtype, leaves.name).reshape(shape)
        return QuantizedTensor(codes, QParams(scale), E4M3, granularity, dtype)


def float_codes(leaves: Leaves, said: Arguments) -> Tensor:
    """The codes of a weight in 8-bit floats, uint8.

    Raises:
        InputError: if `said` is another grid, or a number is NaN.
    """
    if (said.type, said.num_bits, said.symmetric) != ("float", 8, True):
        raise InputError(f"{leaves.name} has floats of {said.num_bits} bits in a byte each: only fp8_e4m3 is known.")
    codes = leaves.take("weight", torch.float8_e4m3fn).view(torch.uint8)
    if (codes & 0x7F == 0x7F).any():
        raise InputError(f"{leaves.name} holds NaN.")
    return codes


def _scales_of_a_row(q: QuantizedTensor) -> int:
    if isinstance(q.granularity, PerBlock):
        return q.shape[1] // q.granularity.columns
    size = WeightGrid.of(q).group_size
    return 1 if size in (None, -1) else q.shape[1] // size
