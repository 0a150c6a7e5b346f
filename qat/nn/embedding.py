"""Embeddings: tables whose rows are quantized as they are looked up, and packed ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.packed import PackedTensor
from qat.quantizers import NoQuantizer, Quantizer


class PackedEmbedding(PackedLayer):
    """y = output_quantizer(dequantize(weight)[ids]); only the rows of `ids` are dequantized where that is possible."""

    kind = "embedding"
    weight: PackedTensor

    def __init__(
        self, module: nn.Module, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weights["weight"].shape
        self.padding_idx: Any = module.padding_idx
        self._adopt(weights, input, output)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.dequantize_rows(input.reshape(-1))
        return self.output_quantizer(rows.view(*input.shape, self.embedding_dim))

    def plain(self, dtype: torch.dtype) -> nn.Module:
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(self.weight.dequantize(dtype))
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class QuantEmbedding(QuantLayer, nn.Embedding):
    """y = output_quantizer(weight_quantizer(W)[ids]).

    Its input holds indices, so it has no input quantizer, and it multiplies nothing, so it has no gradient quantizer.

    Raises:
        InputError: for `max_norm` and `sparse`, which need the full-precision table itself.
    """

    stored = PackedEmbedding

    weight_quantizer: Quantizer | NoQuantizer

    def __init__(self, embedding: nn.Embedding, quantizers: LayerQuantizers) -> None:
        check_quantizable(embedding)
        super().__init__(**_options(embedding))
        self.weight = embedding.weight
        self._adopt(embedding, quantizers)

    @staticmethod
    def features(module: Any) -> tuple[int | None, int]:
        return None, module.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_quantizer(self.weight)
        y = F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return self.output_quantizer(y)

    def plain(self) -> nn.Module:
        embedding = nn.Embedding(**_options(self))
        embedding.weight = self.weight
        return embedding.train(self.training)


def check_quantizable(embedding: nn.Embedding) -> None:
    """Refuse what needs the full-precision table itself."""
    if embedding.max_norm is not None or embedding.sparse:
        raise InputError("An embedding with max_norm or sparse=True cannot be quantized: unset them or exclude it.")


def _options(embedding: nn.Embedding) -> dict[str, Any]:
    """What to build an embedding like this one with; its weight is still to come."""
    names = ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq")
    return {name: getattr(embedding, name) for name in names} | {"device": "meta"}
