"""Tensors that a cast of the model leaves as they are."""

from collections.abc import Callable

from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module whose tensors move between devices with the model, but keep their dtypes when it is cast.

    Scales and codebooks are rounded to their storage types by their own rule; `model.bfloat16()` must not add another.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsDtype":
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
