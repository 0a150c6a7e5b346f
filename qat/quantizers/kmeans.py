"""Learnable codebooks: k-means clustering of the weights, trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError, nearest
from qat.kernels.ops import lloyd_step_
from qat.numerics.codebooks import NF4, table
from qat.numerics.dynamic import absmax_params
from qat.numerics.formats import CodebookFormat
from qat.numerics.granularity import Granularity, parse_granularity, refuse_padding
from qat.numerics.kmeans import equal_mass_1d, kmeans_1d
from qat.numerics.kmeans.soft import soft_assign
from qat.numerics.qtensor import QParams, ViewParams, scale_down, unscale
from qat.numerics.ste import exp2_to_storage, round_to_storage, straight_through
from qat.quantizers.base import Quantizer
from qat.quantizers.log_scale import log_scale_of
from qat.quantizers.observers import Observer, SampleObserver
from qat.quantizers.shards import refuse_shards

_INITS = ("kmeans", "entropy", "nf4")


class KMeansQuantizer(Quantizer):
    """A codebook of 2^bits learned centroids for every tensor, channel or group.

    x ~ scale * codebook[code], each weight going to its nearest centroid. Centroids start where k-means puts them
    (Deep Compression, arXiv 1510.00149) or at NF4, relative to the absolute maximum of what shares a scale; from then
    on each learns from the sum of its members' gradients, and weights pass theirs straight through.

    `refresh` moves the centroids to the means of the weights that they have now, k-means' own update. Called after
    every step, the codebook follows the weights; the gradients then still move it, but only until the next refresh.

    With a `temperature`, training mixes the entries by their distance instead of taking the nearest (DKM, arXiv
    2108.12659). In eval mode and in `quantize` the nearest entry is taken always: what ships is hard.

    Args:
        shape: shape of the tensor, see `Quantizer`.
        bits: 1 to 8; the codebook has 2^bits entries.
        entries: of the codebook, where it shall have another number of them, 2 to 256; `bits` is then not used.
        granularity: who shares a scale.
        codebook: who shares a codebook; the same as `granularity`, or coarser. Default: the same.
        init: `kmeans` (least squared error, weighted by importance where that is given), `entropy` (all codes equally
            often) or `nf4` (4 bits).
        learn_scale: train the scales too; worth it where the codebook is coarser than they are.
        temperature: of the soft assignment in training, in squared units of the codebook, which spans about [-1, 1];
            None assigns hard. The callback `SoftKMeans` cools it.
        entry_bits: 2 to 8; entries are integers of so many bits over 2^(entry_bits - 1), in training too. Packed
            kernels decode those of up to 7 bits with fewer instructions. None leaves them free.
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
        temperature: float | None = None,
        entry_bits: int | None = None,
    ) -> None:
        if bits not in range(1, 9):
            raise InputError(f"A k-means codebook has 1 to 8 bits, not {bits}.")
        entries = 2**bits if entries is None else entries
        super().__init__(shape, CodebookFormat(entries), granularity, scale_dtype)
        refuse_padding(self.granularity, self.shape)
        if init not in _INITS:
            raise InputError(f"There is no codebook initialisation '{init}'.{nearest(init, _INITS)}")
        if temperature is not None and temperature <= 0:
            raise InputError(f"temperature is {temperature}; it is positive, or null for hard assignment.")
        if entry_bits is not None and entry_bits not in range(2, 9):
            raise InputError(
                f"Entries of a codebook have 2 to 8 bits, not entry_bits={entry_bits}; null leaves them free."
            )
        if init == "nf4" and entries != 16:
            raise InputError(f"init=nf4 has 16 entries, not {entries}: set bits=4 and no entries, or use init=kmeans.")
        sharing = self.granularity if codebook is None else parse_granularity(codebook)
        table_shape = sharing.param_shape(self.shape)
        if not is_coarser(table_shape, self.param_shape):
            raise InputError(
                f"A codebook shared {sharing} does not serve whole groups of the scales ({self.granularity}). "
                f"Use granularity={sharing}, or a coarser codebook."
            )
        self.init = init
        self.temperature = temperature
        self.entry_bits = entry_bits
        self.initialized = False
        self.codebook = nn.Parameter(torch.zeros(*table_shape, entries))
        self.log_scale = nn.Parameter(torch.zeros(self.param_shape), requires_grad=learn_scale)

    @property
    def holds_zero(self) -> bool:
        return True  # `qparams` puts it there where weights are pruned

    def qparams(self, x: Tensor) -> QParams:
        # Centroids may cross while they train; the grid is ascending all the same.
        ascending = self.codebook.sort(dim=-1).values
        if self.entry_bits is not None:
            ascending = on_integers(ascending, self.entry_bits)
        if self.mask is not None:
            ascending = with_zero(ascending)
        return QParams(
            scale=exp2_to_storage(self.log_scale, self.scale_dtype),
            codebook=round_to_storage(ascending, self.scale_dtype),
        )

    @torch.no_grad()
    def adopt(self, params: ViewParams) -> bool:
        assert params.codebook is not None
        self.log_scale.copy_(log_scale_of(params.scale, self.scale_dtype).view(self.param_shape))
        self.codebook.copy_(params.codebook.view_as(self.codebook))
        return True

    def make_observer(self) -> Observer:
        return SampleObserver()

    def initialize_from(self, view: Tensor) -> None:
        self._fit(view, None)

    def initialize_weighted(self, view: Tensor, importance: Tensor) -> None:
        self._fit(view, importance)

    @torch.no_grad()
    def refresh(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Move every centroid to the mean of the weights that are nearest to it now, in place: one step of k-means.

        A centroid without members is moved into the cell with the largest squared error.

        Args:
            weight: what this quantizer quantizes.
            importance: how much the squared error of each weight counts, shaped like it; None: all alike.
        """
        self.require_initialized()
        refuse_shards(weight)
        # Entries stay in their places, so that the optimizer's state of each goes on being its own.
        weight = self.masked(weight)
        view, scale = self.granularity.view, torch.exp2(self.log_scale).to(self.scale_dtype)
        table = self.codebook.view(-1, self.codebook.shape[-1])
        lloyd_step_(view(weight), scale.view(-1, 1), table, None if importance is None else view(importance))
        if self.step_codes is not None:
            self.step_codes.renew()

    def forward(self, x: Tensor) -> Tensor:
        return self._soft(x) if self._is_soft else super().forward(x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._soft(weight), bias) if self._is_soft else super().linear(x, weight, bias)

    @property
    def _is_soft(self) -> bool:
        return self.training and self.temperature is not None and self.observer is None

    def _soft(self, x: Tensor) -> Tensor:
        """Fake-quantize with soft assignment, differentiable to x and to the codebook."""
        assert self.temperature is not None
        params = self.ready_qparams(x).for_view()
        assert params.codebook is not None
        v = scale_down(self.granularity.view(x), params)
        v_hat = soft_assign(v.reshape(len(params.codebook), -1), params.codebook, self.temperature)
        return self.masked(self.granularity.unview(unscale(v_hat.view_as(v), params), x.shape).to(x.dtype))

    def _fit(self, view: Tensor, importance: Tensor | None) -> None:
        """Scales from the absolute maxima, the codebook as `init` says."""
        scale = absmax_params(view, self.format, self.scale_dtype).scale
        self.log_scale.data.copy_(log_scale_of(scale, self.scale_dtype).view(self.param_shape))
        rows, entries = self.codebook.numel() // self.codebook.shape[-1], self.codebook.shape[-1]
        if self.init == "nf4":
            self.codebook.data.copy_(table(NF4).expand_as(self.codebook))
            return
        # Where a codebook has one scale, its values are fitted as they are: bf16 weights stay bf16, which the histogram
        # of long rows holds exactly.
        alone = len(scale) == rows
        values = (view if alone else view.to(torch.float32) / scale).reshape(rows, -1)
        if self.init == "entropy":
            found = equal_mass_1d(values, entries)
        else:
            found = kmeans_1d(values, entries, None if importance is None else importance.reshape(rows, -1))
        self.codebook.data.copy_((found / scale if alone else found).view_as(self.codebook))


def on_integers(codebook: Tensor, bits: int) -> Tensor:
    """`codebook` with each entry at the nearest integer of `bits` bits over 2^(bits - 1); the gradient passes through.

    From -1 to 1 - 2^(1 - bits); what lies beyond is moved to the end.
    """
    half = 2.0 ** (bits - 1)
    return straight_through(codebook, (codebook.detach() * half).round().clamp(-half, half - 1) / half)


def with_zero(codebook: Tensor) -> Tensor:
    """`codebook` `[..., entries]`, ascending, with zero for the entry of each row that is nearest to it."""
    return codebook.scatter(-1, codebook.detach().abs().argmin(-1, keepdim=True), 0.0)


def is_coarser(table_shape: Sequence[int], scale_shape: Sequence[int]) -> bool:
    """Whether each codebook serves a run of consecutive scales: equal leading sizes, then a divisor, then ones."""
    if len(table_shape) != len(scale_shape):
        return all(size == 1 for size in table_shape)
    pairs = list(zip(table_shape, scale_shape, strict=True))
    while pairs and pairs[0][0] == pairs[0][1]:
        pairs.pop(0)
    return not pairs or (pairs[0][1] % pairs[0][0] == 0 and all(own == 1 for own, _ in pairs[1:]))
