"""Min-max quantization: the scale follows the extremes of the data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats import IntFormat
from qat.numerics.functional import DYNAMIC_RULES, dynamic_qparams
from qat.numerics.granularity import Granularity, PerToken
from qat.numerics.qtensor import QParams
from qat.quantizers.base import Quantizer


class MinMaxQuantizer(Quantizer):
    """Integers scaled to the extremes of each group, symmetric (LLM-QAT, arXiv 2305.17888) or asymmetric.

    symmetric: scale = max|x| / (2^(bits-1) - 1). Asymmetric: scale = (max - min) / (2^bits - 1), with an integer zero
    point. Gradients pass straight through to x; the extremes are taken as constants.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 2 to 8.
        symmetric: whether zero sits in the middle of the grid.
        dynamic: find the extremes in every x anew; otherwise calibrate once and keep them.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 8,
        granularity: str | Granularity = "per_channel",
        symmetric: bool = True,
        dynamic: bool = True,
        scale_dtype: str = "bfloat16",
    ) -> None:
        super().__init__(shape, IntFormat(bits, signed=symmetric), granularity, scale_dtype)
        self._rule = "absmax" if symmetric else "minmax"
        self.rule = self._rule if dynamic else None
        if dynamic:
            return
        if isinstance(self.granularity, PerToken):
            raise InputError(
                "A static quantizer cannot be per_token: tokens of later batches are not known when calibrating. "
                "Use dynamic=true, or granularity=per_tensor."
            )
        self.initialized = False
        self.register_buffer("scale", torch.ones(self.param_shape))
        if not symmetric:
            self.register_buffer("zero_point", torch.zeros(self.param_shape))

    def qparams(self, x: Tensor) -> QParams:
        if self.rule is None:
            return QParams(self.scale, getattr(self, "zero_point", None))
        return dynamic_qparams(x, self.rule, self.format, self.granularity, self.scale_dtype)

    def initialize_from(self, view: Tensor) -> None:
        if self.rule is not None:
            return
        found = DYNAMIC_RULES[self._rule](view, self.format, self.scale_dtype)
        self.scale.copy_(found.scale.view(self.param_shape))
        if found.zero_point is not None:
            self.zero_point.copy_(found.zero_point.view(self.param_shape))
