"""NormalFloat-4, the storage type of QLoRA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.codebooks import NF4, dynamic_map, table
from qat.numerics.formats import CodebookFormat
from qat.numerics.functional import dynamic_qparams, quantize
from qat.numerics.granularity import Granularity, PerFlatGroup
from qat.numerics.qtensor import QParams, QuantizedTensor
from qat.quantizers.base import Quantizer

_DOUBLE_GROUP = 256


class NF4Quantizer(Quantizer):
    """Block-wise NF4 (QLoRA, arXiv 2305.14314): the quantiles of a normal distribution, scaled by each block's absmax.

    Codes and scales equal those of bitsandbytes, without double_quant to the bit. Nothing is learned; for a codebook
    that starts here and trains, take `KMeansQuantizer(init="nf4")`.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 4.
        granularity: blocks; `per_flat_group_64` is bitsandbytes' layout for sizes that 64 does not divide.
        double_quant: store the scales in 8 bits as well, minus their mean, in blocks of 256 with their own scale.
    """

    rule = "absmax"
    codebook: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 4,
        granularity: str | Granularity = "per_group_64",
        double_quant: bool = False,
        scale_dtype: str = "float32",
    ) -> None:
        if bits != 4:
            raise InputError(f"NF4 has 4 bits, not {bits}; for another width use quantizer kmeans or lsq.")
        super().__init__(shape, CodebookFormat(16), granularity, scale_dtype)
        self.double_quant = double_quant
        values = table(NF4)
        self.register_buffer("codebook", values.view(*(1,) * len(self.param_shape), len(values)), persistent=False)

    def qparams(self, x: Tensor) -> QParams:
        (scale, *_) = dynamic_qparams(x, self.rule, self.format, self.granularity, self.scale_dtype)
        assert isinstance(scale, Tensor)
        return QParams(quantize_scales(scale) if self.double_quant else scale, codebook=self.codebook)


@torch.no_grad()
def quantize_scales(scale: Tensor) -> QuantizedTensor:
    """Double quantization of QLoRA: scales minus their mean as 8-bit dynamic codes, in flat blocks of 256."""
    granularity = PerFlatGroup(_DOUBLE_GROUP)
    offset = scale.mean()
    centred = granularity.view(scale - offset)
    values = table(dynamic_map()).to(scale.device)[None]
    absmax = centred.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    return quantize(scale, QParams(absmax, codebook=values, offset=offset[None]), CodebookFormat(256), granularity)
