"""From a model that is quantized already back to one that can be trained, and to its grid."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qat.errors import InputError
from qat.nn import PackedLayer
from qat.nn.kv_quantizer import kv_layers
from qat.numerics.granularity import Granularity, PerFlatGroup, PerGroup
from qat.numerics.qtensor import QuantizedTensor
from qat.quantizers import Quantizer
from qat.transforms.layers import quant_layers, replace


def unpack(model: nn.Module, dtype: torch.dtype) -> dict[str, QuantizedTensor]:
    """Replace every packed layer of `model` by a plain one whose weight is what the codes stand for, in place.

    Quantized activations are not: what becomes of them the scheme of the new training says.

    Args:
        model: as `load` returns it.
        dtype: of all weights afterwards.

    Returns:
        The grid of each layer's weight by the layer's name, codes being on the meta device: for `adopt_grids`.

    Raises:
        InputError: for layers other than linear ones and embeddings, and for a quantized KV cache.
    """
    if next(kv_layers(model), None) is not None:
        raise InputError("The model has a quantized KV cache: train the model that it was made from.")
    grids: dict[str, QuantizedTensor] = {}
    shared: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, PackedLayer):
            continue
        plain: Any = layer.plain(dtype)
        weight = layer.weights()["weight"]
        plain.weight = shared.setdefault(weight.memory, plain.weight)
        grids[name] = weight.without_codes()
        replace(model, name, plain)
    model.to(dtype)
    return grids


@torch.no_grad()
def adopt_grids(model: nn.Module, grids: Mapping[str, QuantizedTensor]) -> list[str]:
    """Let quantizers begin with scales, zero points and codebooks that `unpack` found, where their grid is the same.

    Args:
        model: a prepared model.
        grids: by the names of layers.

    Returns:
        The names of the layers whose weight is on the grid now, to the bit.
    """
    return [
        name
        for name, layer in quant_layers(model)
        if name in grids
        for _, matrix, quantizer in layer.weights()
        if isinstance(quantizer, Quantizer) and _adopt(quantizer, grids[name])
        if torch.equal(quantizer.quantize(matrix).dequantize(), matrix)
    ]


def _adopt(quantizer: Quantizer, grid: QuantizedTensor) -> bool:
    if quantizer.format != grid.format or not _same_groups(quantizer, grid):
        return False
    found = grid.qparams.for_view()
    if quantizer.adopt(found):
        if quantizer.step_codes is not None:
            quantizer.step_codes.renew()
        return True
    return quantizer.rule is not None  # which may find the same scales by itself


def _same_groups(quantizer: Quantizer, grid: QuantizedTensor) -> bool:
    """Whether both have the same partition, be it of rows or of the flattened tensor."""
    return _of_rows(quantizer.granularity, grid.shape[-1]) == _of_rows(grid.granularity, grid.shape[-1])


def _of_rows(granularity: Granularity, columns: int) -> Granularity:
    """The same partition by rows, if it is one."""
    if isinstance(granularity, PerFlatGroup) and columns % granularity.group_size == 0:
        return PerGroup(granularity.group_size)
    return granularity
