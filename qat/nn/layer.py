"""What all layers have in common that quantize as they compute, and those that store what was quantized.

The weight of every kind of layer is quantized as a matrix `[rows, columns]`, a row for each output, so that every
granularity means the same everywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn.packed import PackedTensor
from qat.quantizers import NoQuantizer, Quantizer


class LayerQuantizers(NamedTuple):
    """The quantizers of one layer: of its weights, by the names of their Parameters, and of what flows through it."""

    weights: Mapping[str, Quantizer | NoQuantizer]
    input: nn.Module
    output: nn.Module
    grad: nn.Module


class QuantWeight(NamedTuple):
    """One weight of a layer: the Parameter's name, the Parameter as a matrix, and what quantizes it."""

    name: str
    matrix: Tensor
    quantizer: Quantizer | NoQuantizer


class QuantLayer(nn.Module, ABC):
    """Mixed into a layer that takes over the Parameters of a plain one and quantizes them as it uses them.

    The quantizer of the Parameter `weight` is the submodule `weight_quantizer`, that of `down_proj` is
    `down_proj_quantizer`.
    """

    stored: ClassVar[type["PackedLayer"]]  # the layer that stores what this one trains
    input_quantizer: nn.Module
    output_quantizer: nn.Module
    grad_quantizer: nn.Module

    @staticmethod
    def names(module: Any) -> list[str]:
        """What the weights of `module`, plain or quantized, are called."""
        return ["weight"]

    @staticmethod
    def as_matrix(module: Any, weight: Tensor) -> Tensor:
        """`weight` of `module`, or a tensor shaped like it, as the matrix `[rows, columns]`."""
        return weight

    @classmethod
    def matrix(cls, module: Any, name: str) -> Tensor:
        """The weight `name` of `module` as the matrix `[rows, columns]`."""
        return cls.as_matrix(module, getattr(module, name))

    def from_matrix(self, name: str, matrix: Tensor) -> Tensor:
        """`matrix` in the shape of the weight `name`: the inverse of `as_matrix`."""
        return matrix.reshape(getattr(self, name).shape)

    def write(self, name: str, matrix: Tensor) -> None:
        """Give the weight `name` the values of `matrix`, in place."""
        getattr(self, name).detach().copy_(self.from_matrix(name, matrix))

    @staticmethod
    @abstractmethod
    def features(module: Any) -> tuple[int | None, int]:
        """Size of the last dimension of the input, None where the input holds no activations, and of the output."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """The layer without its quantizers, holding the same Parameters."""

    def pack(self, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module) -> "PackedLayer":
        """The layer that stores `weights`."""
        return self.stored(self, weights, input, output)

    def weights(self) -> Iterator[QuantWeight]:
        """Every weight with its quantizer."""
        for name in self.names(self):
            yield QuantWeight(name, self.matrix(self, name), getattr(self, f"{name}_quantizer"))

    @property
    def packs(self) -> bool:
        """Whether a weight gets codes."""
        return any(isinstance(getattr(self, f"{name}_quantizer"), Quantizer) for name in self.names(self))

    def _adopt(self, module: nn.Module, quantizers: LayerQuantizers) -> None:
        for name, quantizer in quantizers.weights.items():
            setattr(self, f"{name}_quantizer", quantizer)
        self.input_quantizer = quantizers.input
        self.output_quantizer = quantizers.output
        self.grad_quantizer = quantizers.grad
        self.train(module.training)


class PackedLayer(nn.Module):
    """Mixed into a layer that holds packed weights and no Quantizer, for inference.

    Built from a plain or a QuantLayer module, of which it keeps everything but the quantized weights.
    """

    kind: ClassVar[str]
    weight_names: tuple[str, ...] = ("weight",)
    input_quantizer: nn.Module
    output_quantizer: nn.Module

    def weights(self) -> dict[str, PackedTensor]:
        """Every packed weight by name."""
        return {name: getattr(self, name) for name in self.weight_names}

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The layer in full precision, its weight being what the codes stand for; activations are not quantized.

        Raises:
            InputError: for kinds of layers that cannot be trained on.
        """
        raise InputError(f"A packed {self.kind} layer cannot be trained on: train the model that it was made from.")

    def _adopt(self, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module) -> None:
        for name, weight in weights.items():
            setattr(self, name, weight)
        self.input_quantizer = input
        self.output_quantizer = output
