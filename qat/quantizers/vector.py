"""Learned vector codebooks: one code for a pair of weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.numerics.dynamic import absmax_params
from qat.numerics.formats import VectorFormat
from qat.numerics.granularity import Granularity, parse_granularity, refuse_padding
from qat.numerics.kmeans.vectors import kmeans_vectors
from qat.numerics.qtensor import QParams, codes_shape
from qat.numerics.ste import exp2_to_storage, round_to_storage
from qat.quantizers.base import Quantizer
from qat.quantizers.kmeans import is_coarser
from qat.quantizers.log_scale import log_scale_of


class VectorQuantizer(Quantizer):
    """A codebook of 2^(bits * block) learned vectors: (x_2i, x_2i+1) ~ scale * codebook[code_i].

    A plane holds more evenly spread points than the product of two lines (GPTVQ, arXiv 2402.15319). Vectors start where
    k-means puts them, relative to the absolute maximum of what shares a scale; each then learns from the sum of its
    members' gradients, and weights pass theirs straight through.

    Args:
        shape: shape of the tensor, see `Quantizer`; `block` divides its last dimension.
        bits: for each weight; bits * block is at most 8.
        block: consecutive weights that share a code: 2, 4 or 8.
        granularity: who shares a scale.
        codebook: who shares a codebook.
        learn_scale: whether scales are learned.
    """

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 4,
        block: int = 2,
        granularity: str | Granularity = "per_channel",
        codebook: str | Granularity = "per_tensor",
        learn_scale: bool = False,
        scale_dtype: str = "bfloat16",
    ) -> None:
        if bits < 1 or block not in (2, 4, 8) or bits * block > 8:
            raise InputError(f"bits * block is {bits} * {block}; a vector codebook has at most 8 bits: set block=2.")
        grid = VectorFormat(2 ** (bits * block), block)
        super().__init__(shape, grid, granularity, scale_dtype)
        refuse_padding(self.granularity, self.shape)
        codes_shape(self.shape, grid)
        self.granularity.of_codes(block)
        table_shape = parse_granularity(codebook).param_shape(self.shape)
        if not is_coarser(table_shape, self.param_shape):
            raise InputError(
                f"A codebook shared {codebook} does not serve whole groups of the scales ({self.granularity}). "
                "Use codebook=per_tensor."
            )
        self.initialized = False
        self.codebook = nn.Parameter(torch.zeros(*table_shape, grid.entries * block))
        self.log_scale = nn.Parameter(torch.zeros(self.param_shape), requires_grad=learn_scale)

    def qparams(self, x: Tensor) -> QParams:
        return QParams(
            scale=exp2_to_storage(self.log_scale, self.scale_dtype),
            codebook=round_to_storage(self.codebook, self.scale_dtype),
        )

    def initialize_from(self, view: Tensor) -> None:
        scale = absmax_params(view, self.format, self.scale_dtype).scale
        self.log_scale.data.copy_(log_scale_of(scale, self.scale_dtype).view(self.param_shape))
        rows = self.codebook.numel() // self.codebook.shape[-1]
        points = (view.to(torch.float32) / scale).reshape(rows, -1, self.format.block)
        entries = self.codebook.shape[-1] // self.format.block
        self.codebook.data.copy_(kmeans_vectors(points, entries).view_as(self.codebook))
