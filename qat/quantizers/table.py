"""Fixed codebooks: NF4 and its relatives, powers of two, binary and ternary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import InputError, nearest
from qat.kernels import ops
from qat.numerics.codebooks import dynamic_map, fixed_codebook, table
from qat.numerics.dynamic import RULES_OF_MEANS
from qat.numerics.formats import CodebookFormat
from qat.numerics.functional import quantize
from qat.numerics.granularity import Granularity, PerFlatGroup, refuse_padding
from qat.numerics.qtensor import QParams, QuantizedTensor
from qat.quantizers.base import Quantizer
from qat.quantizers.rounding import is_stochastic

_RULES = ("absmax", *RULES_OF_MEANS)
_DOUBLE_GROUP = 256


class TableQuantizer(Quantizer):
    """A published codebook, scaled to each group: x ~ scale * codebook[code]. Nothing is learned.

    | family | bits | values | source |
    |---|---|---|---|
    | nf | 2 to 8 | quantiles of a normal distribution | QLoRA, arXiv 2305.14314 |
    | af | 4 | least absolute error on scaled normal weights | arXiv 2306.06965 |
    | pot | 2 to 5 | zero and powers of two | INQ, arXiv 1702.03044 |
    | apot | 2 to 8 | sums of powers of two | arXiv 1909.13144 |
    | binary | 1 | -1, 1 | XNOR-Net, arXiv 1603.05279 |
    | ternary | 2 | -1, 0, 1 | BitNet b1.58, arXiv 2402.17764; TWN, arXiv 1605.04711 |

    Codes and scales of nf with 4 bits equal those of bitsandbytes, without double_quant to the bit. For a codebook that
    starts here and trains, take `KMeansQuantizer(init="nf4")`.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        family, bits: which codebook.
        granularity: blocks; `per_flat_group_64` is bitsandbytes' layout for sizes that 64 does not divide.
        rule: how the scale follows from x: `absmax`, or for binary and ternary `absmean` or `twn`.
        double_quant: store the scales in 8 bits as well, minus their mean, in blocks of 256 with their own scale.
        rounding: `nearest`, or `stochastic`, whose expectation is x itself within the codebook: for gradients. Scales
            by absmax leave nothing beyond it.
    """

    codebook: Tensor
    scale_codebook: Tensor | None  # for double quantization
    codebook_dtype = torch.float32  # one for the whole tensor, exactly as published

    def __init__(
        self,
        shape: Sequence[int],
        family: str = "nf",
        bits: int = 4,
        granularity: str | Granularity = "per_group_64",
        rule: str = "absmax",
        double_quant: bool = False,
        rounding: str = "nearest",
        scale_dtype: str = "float32",
    ) -> None:
        values = fixed_codebook(family, bits)
        super().__init__(shape, CodebookFormat(len(values)), granularity, scale_dtype)
        if rule not in _RULES:
            raise InputError(f"A table is not scaled by a rule '{rule}'.{nearest(rule, _RULES)}")
        if rule in RULES_OF_MEANS:
            refuse_padding(self.granularity, self.shape)
        self.rule = rule
        self.stochastic = is_stochastic(rounding)
        self.register_buffer("codebook", values.view(*(1,) * len(self.param_shape), len(values)), persistent=False)
        self.register_buffer("scale_codebook", table(dynamic_map())[None] if double_quant else None, persistent=False)

    @property
    def holds_zero(self) -> bool:
        return bool((self.codebook == 0).any())

    @property
    def follows_rule(self) -> bool:
        return self.scale_codebook is None

    def qparams(self, x: Tensor) -> QParams:
        assert self.rule is not None
        (scale, *_) = ops.dynamic_qparams(x, self.rule, self.format, self.granularity, self.scale_dtype)
        assert isinstance(scale, Tensor)
        if self.scale_codebook is not None:
            return QParams(quantize_scales(scale, self.scale_codebook), codebook=self.codebook)
        return QParams(scale, codebook=self.codebook)


@torch.no_grad()
def quantize_scales(scale: Tensor, codebook: Tensor) -> QuantizedTensor:
    """Double quantization of QLoRA: scales minus their mean as 8-bit codes of `codebook` `[1, 256]`, in flat blocks."""
    granularity = PerFlatGroup(_DOUBLE_GROUP)
    offset = scale.mean()
    centred = granularity.view(scale - offset)
    absmax = centred.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    return quantize(scale, QParams(absmax, codebook=codebook, offset=offset[None]), CodebookFormat(256), granularity)
