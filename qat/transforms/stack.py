"""Layers that read the same tensor, as one matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.nn import QuantLinear
from qat.numerics.columns import ColumnGrid, Columns
from qat.numerics.sparsity import MaskedColumns
from qat.quantizers import Quantizer
from qat.transforms.inputs import Group
from qat.transforms.rounding import quantizer_of


class Stack:
    """The weights of layers that read the same tensor, on top of each other, and what quantizes each of them.

    Rows know nothing of each other in GPTQ and in coordinate descent, so one pass over the columns serves all of them.

    Attributes:
        names: of the layers.
        weight: `[out, in]` in float32, as it was.
        quantizers: of the layers; grids are of one kind and granularity, and either all have a mask or none.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[Tensor], quantizers: Sequence[Quantizer]) -> None:
        self.names, self.quantizers = names, quantizers
        self._weights = [weight.detach() for weight in weights]
        self.weight = torch.cat([weight.to(torch.float32) for weight in self._weights])

    @classmethod
    def of(cls, layers: Group) -> "Stack":
        """That of layers by name."""
        return cls(
            list(layers),
            [layer.weight for layer in layers.values()],
            [quantizer_of(layer) for layer in layers.values()],
        )

    def split(self, matrix: Tensor) -> Sequence[Tensor]:
        """The part of each layer in a matrix like `weight`."""
        return matrix.split([len(weight) for weight in self._weights])

    def columns(self) -> ColumnGrid:
        """The grid of every column as it is now, where pruned elements are zero."""
        parts = zip(self.quantizers, self.split(self.weight), strict=True)
        columns = Columns.stacked([_columns_of(quantizer, weight) for quantizer, weight in parts])
        masks = [quantizer.mask for quantizer in self.quantizers if quantizer.mask is not None]
        return MaskedColumns(columns, torch.cat(masks)) if masks else columns

    def fill_(self, w_hat: Tensor) -> None:
        """Give each layer its part of `w_hat` as its weight."""
        for weight, own in zip(self._weights, self.split(w_hat), strict=True):
            weight.copy_(own)


def stacks(layers: Group) -> list[Stack]:
    """`layers`, which read the same tensor, with those together whose grids are of one kind and granularity."""
    kinds: dict[object, Group] = {}
    for name, layer in layers.items():
        kinds.setdefault(_kind(layer), {})[name] = layer
    return [Stack.of(alike) for alike in kinds.values()]


def _kind(layer: QuantLinear) -> object:
    quantizer = quantizer_of(layer)
    return _columns_of(quantizer, layer.weight.detach()).kind, quantizer.granularity, quantizer.mask is None


def _columns_of(quantizer: Quantizer, weight: Tensor) -> Columns:
    qparams = quantizer.ready_qparams(quantizer.masked(weight))
    return Columns(qparams, quantizer.format, quantizer.granularity, weight.shape)
