"""Learnable codebooks: k-means clustering of the weights, trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.numerics.codebooks import NF4, table
from qat.numerics.dynamic import absmax_params
from qat.numerics.formats import CodebookFormat
from qat.numerics.granularity import Granularity, parse_granularity
from qat.numerics.kmeans import kmeans_1d
from qat.numerics.qtensor import QParams
from qat.numerics.ste import round_to_storage
from qat.quantizers.base import Quantizer
from qat.quantizers.log_scale import from_log_scale, log_scale_of
from qat.quantizers.observers import Observer, SampleObserver


class KMeansQuantizer(Quantizer):
    """A codebook of 2^bits learned centroids for every tensor, channel or group.

    x ~ scale * codebook[code], each weight going to its nearest centroid. Centroids start where k-means puts them
    (Deep Compression, arXiv 1510.00149) or at NF4, relative to the absolute maximum of what shares a scale; from then
    on each learns from the sum of its members' gradients, and weights pass theirs straight through.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 1 to 8; the codebook has 2^bits entries.
        entries: of the codebook, where it shall have another number of them, 2 to 256; `bits` is then not used.
        granularity: who shares a scale.
        codebook: who shares a codebook; the same as `granularity`, or coarser. Default: the same.
        init: `kmeans` or `nf4` (4 bits).
        learn_scale: train the scales too; worth it where the codebook is coarser than they are.
    """

    def __init__(
        self,
        shape: Sequence[int],
        bits: int = 4,
        entries: int | None = None,
        granularity: str | Granularity = "per_channel",
        codebook: str | Granularity | None = None,
        init: str = "kmeans",
        learn_scale: bool = False,
        scale_dtype: str = "bfloat16",
    ) -> None:
        if bits not in range(1, 9):
            raise InputError(f"A k-means codebook has 1 to 8 bits, not {bits}.")
        entries = 2**bits if entries is None else entries
        super().__init__(shape, CodebookFormat(entries), granularity, scale_dtype)
        if init not in ("kmeans", "nf4"):
            raise InputError(f"There is no codebook initialisation '{init}'.{nearest(init, ('kmeans', 'nf4'))}")
        if init == "nf4" and entries != 16:
            raise InputError(f"init=nf4 has 16 entries, not {entries}: set bits=4 and no entries, or use init=kmeans.")
        sharing = self.granularity if codebook is None else parse_granularity(codebook)
        table_shape = sharing.param_shape(self.shape)
        if not is_coarser(table_shape, self.param_shape):
            raise InputError(
                f"The codebook is shared {sharing}, finer than the scales ({self.granularity}). "
                f"Use granularity={sharing}, or a coarser codebook."
            )
        self.init = init
        self.initialized = False
        self.codebook = nn.Parameter(torch.zeros(*table_shape, entries))
        self.log_scale = nn.Parameter(torch.zeros(self.param_shape), requires_grad=learn_scale)

    def qparams(self, x: Tensor) -> QParams:
        # Centroids may cross while they train; the grid is ascending all the same.
        ascending = self.codebook.sort(dim=-1).values
        return QParams(
            scale=round_to_storage(from_log_scale(self.log_scale), self.scale_dtype),
            codebook=round_to_storage(ascending, self.scale_dtype),
        )

    def make_observer(self) -> Observer:
        return SampleObserver()

    def initialize_from(self, view: Tensor) -> None:
        scale = absmax_params(view, self.format, self.scale_dtype).scale
        self.log_scale.data.copy_(log_scale_of(scale, self.scale_dtype).view(self.param_shape))
        entries = self.codebook.shape[-1]
        if self.init == "nf4":
            self.codebook.data.copy_(table(NF4).expand_as(self.codebook))
            return
        rows = self.codebook.numel() // entries
        relative = view.to(torch.float32) / scale
        self.codebook.data.copy_(kmeans_1d(relative.reshape(rows, -1), entries).view_as(self.codebook))


def is_coarser(table_shape: Sequence[int], scale_shape: Sequence[int]) -> bool:
    """Whether each codebook serves a run of consecutive scales: equal leading sizes, then ones."""
    if len(table_shape) != len(scale_shape):
        return all(size == 1 for size in table_shape)
    ones = False
    for own, other in zip(table_shape, scale_shape, strict=True):
        ones = ones or own != other
        if ones and own != 1:
            return False
    return True
