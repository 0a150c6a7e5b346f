"""Layers: a Quant layer while training, a Packed one once converted, for every kind of module that holds weights."""

from torch import nn

from qat.nn.activation import StoredActivation
from qat.nn.conv import PackedConv1d, PackedConv2d, QuantConv1d, QuantConv2d
from qat.nn.custom_embedding import PackedCustomEmbedding, QuantCustomEmbedding
from qat.nn.embedding import PackedEmbedding, QuantEmbedding
from qat.nn.experts import PackedExperts, QuantExperts, is_experts
from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.linear import PackedLinear, QuantLinear
from qat.nn.low_bit_linear import LowBitLinear
from qat.nn.packed import PackedTensor
from qat.nn.quantize_grad import quantize_grad

__all__ = [
    "PACKED_LAYERS",
    "LayerQuantizers",
    "LowBitLinear",
    "PackedConv1d",
    "PackedConv2d",
    "PackedCustomEmbedding",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLayer",
    "PackedLinear",
    "PackedTensor",
    "QuantConv1d",
    "QuantConv2d",
    "QuantCustomEmbedding",
    "QuantEmbedding",
    "QuantExperts",
    "QuantLayer",
    "QuantLinear",
    "StoredActivation",
    "quant_class",
    "quantize_grad",
]

PACKED_LAYERS = {
    layer.kind: layer
    for layer in (PackedLinear, PackedEmbedding, PackedCustomEmbedding, PackedConv1d, PackedConv2d, PackedExperts)
}

# Exact types: a subclass computes something else than its base class does.
_QUANT_CLASSES: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}


def quant_class(module: nn.Module) -> type[QuantLayer] | None:
    """The class that takes the place of the plain `module` while training; None where nothing can be quantized."""
    if isinstance(module, QuantLayer | PackedLayer):
        return None
    if is_experts(module):
        return QuantExperts
    if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
        return QuantCustomEmbedding
    return _QUANT_CLASSES.get(type(module))
