"""Small floats in small blocks: the OCP microscaling formats and NVFP4."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels import ops
from qat.numerics.dynamic import divided
from qat.numerics.formats import FloatFormat, parse_format
from qat.numerics.granularity import Granularity, PerTensor
from qat.numerics.qtensor import QParams, QuantizedTensor
from qat.quantizers.base import Quantizer, check_bits

_E4M3 = FloatFormat(4, 3)


class MicroscalingQuantizer(Quantizer):
    """MXFP4, MXFP6 and MXFP8: blocks of 32 floats share a scale that is a power of two, stored as an 8-bit exponent.

    OCP Microscaling Formats (MX) 1.0; Microscaling Data Formats for Deep Learning (arXiv 2310.10537). Nothing is
    learned.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        format: fp4_e2m1, fp6_e2m3, fp6_e3m2, fp8_e4m3 or fp8_e5m2.
        bits: if given, must be those of the format.
    """

    rule = "microscaling"

    def __init__(
        self,
        shape: Sequence[int],
        format: str = "fp4_e2m1",
        bits: int | None = None,
        granularity: str | Granularity = "per_group_32",
    ) -> None:
        grid = parse_format(format)
        if not isinstance(grid, FloatFormat):
            raise InputError(f"Microscaling has small floats, not {format}: set format to fp4_e2m1 or fp8_e4m3.")
        super().__init__(shape, check_bits(grid, bits), granularity)
        self.scale_dtype = torch.float8_e8m0fnu

    def qparams(self, x: Tensor) -> QParams:
        return ops.dynamic_qparams(x, self.rule, self.format, self.granularity, self.scale_dtype)


class NVFP4Quantizer(Quantizer):
    """NVFP4: blocks of 16 fp4_e2m1 numbers share an fp8_e4m3 scale, and all of those one float32 scale.

    scale of the tensor = max|x| / (6 * 448); scale of a block = its max|x| / 6 / scale of the tensor, in fp8_e4m3.
    Pretraining Large Language Models with NVFP4 (arXiv 2509.25149). For weights: the second level covers the whole
    tensor, which for activations would let tokens see each other.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 4.
    """

    clips = False  # both levels follow from x

    def __init__(
        self, shape: Sequence[int], bits: int | None = None, granularity: str | Granularity = "per_group_16"
    ) -> None:
        super().__init__(shape, check_bits(FloatFormat(2, 1), bits), granularity, "float32")

    def qparams(self, x: Tensor) -> QParams:
        return QParams(self._scales(x.detach()))

    @torch.no_grad()
    def _scales(self, x: Tensor) -> QuantizedTensor:
        (scale, *_) = ops.dynamic_qparams(x, "absmax", self.format, self.granularity, self.scale_dtype)
        assert isinstance(scale, Tensor)
        largest = scale.amax() if scale.numel() else scale.new_zeros(())
        tensor_scale = divided(largest, _E4M3.range()[1]).clamp(min=torch.finfo(torch.float32).tiny)
        # Code 1 is the smallest positive number: a block of zeros still needs a scale to divide by.
        codes = _E4M3.encode(scale / tensor_scale).clamp(min=1)
        second = QParams(tensor_scale.view((1,) * scale.ndim))
        return QuantizedTensor(codes, second, _E4M3, PerTensor(), torch.float32)
