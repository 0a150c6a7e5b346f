"""Layers: QuantLinear while training, PackedLinear once converted."""

from qat.nn.activation import StoredActivation
from qat.nn.packed import PackedLinear, PackedTensor
from qat.nn.quant_linear import QuantLinear

__all__ = ["PackedLinear", "PackedTensor", "QuantLinear", "StoredActivation"]
