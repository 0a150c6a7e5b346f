"""What every format of compressed-tensors offers: how one weight is stored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.numerics.qtensor import QuantizedTensor


class Store(ABC):
    """One format.

    Attributes:
        format: its name in config.json.
        inputs: the types of quantized inputs that go with it: `int`, `float`.
    """

    format: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        """Everything that keeps a weight from being stored."""

    @abstractmethod
    def arguments(self, weight: WeightGrid) -> Arguments:
        """What the config says of a weight that has no misfits."""

    @abstractmethod
    def tensors(self, q: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a weight."""

    @abstractmethod
    def restore(self, leaves: Leaves, said: Arguments, dtype: torch.dtype) -> QuantizedTensor:
        """The inverse of `tensors`, for a model of `dtype`.

        Raises:
            InputError: if the tensors are not what `said` says.
        """
