"""A tensor that grows in place."""

from collections.abc import Callable

import torch
from torch import Tensor


class GrowingRows:
    """Rows `[..., rows, width]` to which others are appended; memory for up to `step` more is kept ready.

    A concatenation would read and write everything for every token, which takes longer than to attend to it. Here
    that happens once in `step` rows, and what a head has stays in one place in between.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._memory: Tensor | None = None
        self._length = 0

    @property
    def rows(self) -> Tensor:
        """All rows; good until the next change.

        Raises:
            AssertionError: if there never were any.
        """
        assert self._memory is not None, "nothing was appended yet"
        return self._memory[..., : self._length, :]

    def append(self, new: Tensor) -> None:
        """Add rows, shaped and typed as the first ones were."""
        end = self._length + new.shape[-2]
        if self._memory is None or end > self._memory.shape[-2]:
            self._memory = self._grown(new, -(-end // self._step) * self._step)
        self._memory[..., self._length : end, :] = new
        self._length = end

    def crop(self, length: int) -> None:
        """Keep the first `length` rows."""
        self._length = min(length, self._length)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the tensor by what `change`, which works on the first dimension, makes of it."""
        with torch.inference_mode(False):
            self._memory = None if self._memory is None else change(self._memory)

    def _grown(self, like: Tensor, room: int) -> Tensor:
        with torch.inference_mode(False):  # whose tensors could not be written to outside of it
            memory = torch.empty((*like.shape[:-2], room, like.shape[-1]), dtype=like.dtype, device=like.device)
        if self._length:
            memory[..., : self._length, :] = self.rows
        return memory
