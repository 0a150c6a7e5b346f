"""Subclasses of nn.Embedding that compute something of their own, such as Gemma's, which scales its rows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat.nn.embedding import check_quantizable
from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.packed import PackedTensor
from qat.nn.stand_in import StandIn
from qat.quantizers import NoQuantizer, Quantizer


class PackedCustomEmbedding(StandIn, PackedLayer):
    """Runs the forward of the embedding with the whole table dequantized, for inference."""

    kind = "custom_embedding"
    weight: PackedTensor

    def __init__(
        self, module: nn.Module, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module
    ) -> None:
        super().__init__()
        self._take_over(module, without=weights)
        self._adopt(weights, input, output)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output_quantizer(self._run({"weight": self.weight.dequantize()}, *args, **kwargs))


class QuantCustomEmbedding(StandIn, QuantLayer):
    """Runs the forward of the embedding with its table fake-quantized.

    Raises:
        InputError: for `max_norm` and `sparse`, as QuantEmbedding.
    """

    stored = PackedCustomEmbedding

    weight: nn.Parameter
    weight_quantizer: Quantizer | NoQuantizer

    def __init__(self, embedding: nn.Embedding, quantizers: LayerQuantizers) -> None:
        check_quantizable(embedding)
        super().__init__()
        self._take_over(embedding)
        self._adopt(embedding, quantizers)

    @staticmethod
    def features(module: Any) -> tuple[int | None, int]:
        return None, module.embedding_dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output_quantizer(self._run({"weight": self.weight_quantizer(self.weight)}, *args, **kwargs))

    def plain(self) -> nn.Module:
        return self._restored()
