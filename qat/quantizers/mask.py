"""Pruned weights: a mask beside the quantizer of a weight."""

from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.ste import straight_through
from qat.quantizers.keep_dtype import KeepsDtype


class Masked(KeepsDtype):
    """What every quantizer of a weight has in common, also the one that leaves full precision: it may hold a mask.

    A weight has one quantizer, however many layers share it, and therefore one mask. Without one nothing is computed
    and nothing stored.

    Attributes:
        mask: which elements of the tensor are kept, boolean and shaped like it; the others are exactly zero before they
            are quantized, and after. None keeps all.
        dense_gradient: whether pruned elements get the gradient that they would have if they were kept, straight
            through: they go on learning, and another mask may let them return. Otherwise they get none.
    """

    mask: Tensor | None
    dense_gradient: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    @property
    def holds_zero(self) -> bool:
        """Whether zero is decoded as exactly zero."""
        return True

    def set_mask(self, mask: Tensor | None) -> None:
        """Prune what `mask` leaves out; None keeps all.

        Raises:
            InputError: if the grid has no zero.
        """
        if mask is not None:
            self.require_zero()
        self.mask = mask

    def require_zero(self) -> None:
        """Refuse a grid on which a pruned weight would not be zero."""
        if not self.holds_zero:
            raise InputError(
                f"pruned weights are exactly zero, and the grid of {type(self).__name__} has no zero there: take "
                "quantizer@scheme.weight=lsq, ternary_lsq or kmeans."
            )

    def masked(self, x: Tensor) -> Tensor:
        """`x`, zero where it is pruned."""
        if self.mask is None:
            return x
        kept = torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
        return straight_through(x, kept.detach()) if self.dense_gradient else kept

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}mask")
        if stored is not None and self.mask is None:  # as in a checkpoint of a run that prunes
            self.mask = torch.empty_like(stored)
        super()._load_from_state_dict(state_dict, prefix, *args)
