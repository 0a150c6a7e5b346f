"""The tensors of one stored layer, each checked as it is taken."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qat.errors import InputError


class Leaves:
    """The tensors of the layer `name`, named without it.

    `finish` refuses what nobody took: a tensor that is left out would change what the layer computes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.name = name
        self._tensors = dict(tensors)
        self._tensors.pop("bias", None)

    def __contains__(self, leaf: str) -> bool:
        return leaf in self._tensors

    def take(self, leaf: str, *dtypes: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
        """The tensor `leaf`, of one of `dtypes` and, where it is given, of `shape`.

        Raises:
            InputError: if it is not.
        """
        if leaf not in self._tensors:
            raise InputError(f"{self.name} has no {leaf}: its tensors are not what its config.json says.")
        tensor = self._tensors.pop(leaf)
        if tensor.dtype not in dtypes or tensor.ndim > 2:
            raise InputError(f"{self.name}.{leaf} is {tensor.dtype} {list(tensor.shape)}, and {dtypes[0]} is expected.")
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"{self.name}.{leaf} is {list(tensor.shape)}, and the rest of the layer and its config.json say "
                f"{list(shape)}."
            )
        return tensor

    def drop(self, *leaves: str) -> None:
        """Let go of tensors that say nothing."""
        for leaf in leaves:
            self._tensors.pop(leaf, None)

    def finish(self) -> None:
        """Refuse what is left, but zero points of symmetric grids, which early versions of the library stored."""
        self._tensors = {leaf: tensor for leaf, tensor in self._tensors.items() if not _says_nothing(leaf, tensor)}
        if "weight_g_idx" in self._tensors:
            raise InputError(
                f"{self.name} has its columns in the order of their activations (weight_g_idx), which no grid here "
                "has: quantize the model again with actorder=null."
            )
        if self._tensors:
            raise InputError(f"{self.name} has {min(self._tensors)}, which its config.json does not tell of.")


def _says_nothing(leaf: str, tensor: Tensor) -> bool:
    packed = tensor.dtype == torch.int32  # whose zeros are the lowest code
    return leaf.endswith("_zero_point") and not packed and not tensor.to(torch.float32).any()
