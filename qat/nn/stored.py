"""What an artifact stores stays in its dtypes: casting a model moves it, and rounds it no further."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


class Stored(nn.Module):
    """Holds codes, scales and codebooks in the dtypes of an artifact, whatever the model around it is cast to."""

    def _apply(self, fn: Change, recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)


def keeping_dtype(fn: Change) -> Change:
    """`fn`, which moves or casts a tensor, without the cast."""

    def moved(tensor: Tensor) -> Tensor:
        changed = fn(tensor)
        return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

    return moved
