"""After training: swap every layer that quantizes for one that stores codes."""

import torch
from torch import nn

from qat.errors import InputError
from qat.nn import PackedLinear, PackedTensor, QuantLayer, StoredActivation
from qat.nn.kv_quantizer import kv_layers
from qat.quantizers import Quantizer
from qat.transforms.kv import store_kv
from qat.transforms.layers import quant_layers, replace
from qat.transforms.masks import write_zeros

# The packed codes of every Parameter, by the Parameter's id.
Packed = dict[int, PackedTensor]


def convert(model: nn.Module) -> nn.Module:
    """Replace every layer of `model` that quantizes its weight by one that stores codes, in place.

    Layers that share a weight share its packed codes. The full-precision weights are released. Layers that quantize
    nothing but gradients, which inference has none of, or only hold masks, become plain again, with their zeros. KV
    quantizers keep what they compute.

    Raises:
        InputError: if nothing was prepared, a weight holds NaN, or a static quantizer was never calibrated.
    """
    packed: Packed = {}
    layers = list(quant_layers(model))
    if not layers and next(kv_layers(model), None) is None:
        raise InputError("Nothing to convert: no layer quantizes. Call qat.prepare(model, scheme) first.")
    for name, layer in layers:
        write_zeros(layer)
        new = _packed_layer(name, layer, packed) if layer.packs else layer.plain()
        replace(model, name, new.train(layer.training))
        if isinstance(new, PackedLinear):
            new.put_in_order()
    return store_kv(model)


def _packed_layer(name: str, layer: QuantLayer, packed: Packed) -> nn.Module:
    weights = {}
    for weight_name, matrix, quantizer in layer.weights():
        assert isinstance(quantizer, Quantizer)
        key = id(getattr(layer, weight_name))
        if key not in packed:
            if not torch.isfinite(matrix).all():
                raise InputError(f"The {weight_name} of {name} holds NaN or infinity: training diverged.")
            packed[key] = PackedTensor.from_quantized(quantizer.quantize(matrix))
        weights[weight_name] = packed[key]
    return layer.pack(weights, *(_stored(q, matrix.device) for q in (layer.input_quantizer, layer.output_quantizer)))


def _stored(quantizer: nn.Module, device: torch.device) -> nn.Module:
    return StoredActivation.from_quantizer(quantizer).to(device) if isinstance(quantizer, Quantizer) else nn.Identity()
