"""What a model stores, told without its numbers: by this a target says what it can hold, before a model is trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.nn import PackedLayer, QuantLayer, StoredActivation
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity, PerChannel, PerFlatGroup, PerGroup, PerToken
from qat.numerics.qtensor import QuantizedTensor, codes_shape
from qat.quantizers import Quantizer


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """The grid of a weight.

    Attributes:
        format, granularity, shape: as in `QuantizedTensor`; the shape is that of the values.
        dtype: what it is dequantized to.
        scale: the dtype of the scales, or their grid where they are quantized themselves.
        zero_point: whether there are zero points.
        codebook: the table, on the meta device where its values are not known; None where there is none.
        offset: whether something is added at the end.
    """

    format: Format
    granularity: Granularity
    shape: torch.Size
    dtype: torch.dtype
    scale: "torch.dtype | WeightGrid"
    zero_point: bool = False
    codebook: Tensor | None = None
    offset: bool = False

    @classmethod
    def of(cls, q: QuantizedTensor) -> "WeightGrid":
        """The grid of `q`."""
        scale, zero_point, codebook, offset = q.qparams
        own = cls.of(scale) if isinstance(scale, QuantizedTensor) else scale.dtype
        return cls(q.format, q.granularity, q.shape, q.dtype, own, zero_point is not None, codebook, offset is not None)

    @property
    def group_size(self) -> int | None:
        """Consecutive elements of a row that share a scale, -1 for all of them; None where groups are not such."""
        columns, granularity = self.shape[-1], self.granularity
        if granularity in (PerChannel(), PerToken()):
            return -1
        if isinstance(granularity, PerGroup | PerFlatGroup) and columns % granularity.group_size == 0:
            return granularity.group_size
        return None


class ActivationGrid(NamedTuple):
    """The grid of what flows into a layer or out of it; `rule` says how dynamic scales are found, None: static ones."""

    format: Format
    granularity: Granularity
    rule: str | None
    scale_dtype: torch.dtype


class LayerGrid(NamedTuple):
    """The grids of one layer: of its kind, of each of its weights, of its input and its output."""

    kind: str
    weights: Mapping[str, WeightGrid]
    input: ActivationGrid | None
    output: ActivationGrid | None


def layer_grids(model: nn.Module) -> dict[str, LayerGrid]:
    """The grids of every quantized layer of `model`, prepared or converted, on any device, by the layers' names."""
    return {name: grid for name, module in model.named_modules() for grid in _of_layer(module)}


def _of_layer(module: nn.Module) -> Iterator[LayerGrid]:
    if isinstance(module, PackedLayer):
        kind = module.kind
        weights = {name: WeightGrid.of(weight.without_codes()) for name, weight in module.weights().items()}
    elif isinstance(module, QuantLayer) and module.packs:
        kind = module.stored.kind
        weights = {name: _of_quantizer(q, w) for name, w, q in module.weights() if isinstance(q, Quantizer)}
    else:
        return
    yield LayerGrid(kind, weights, _of_role(module.input_quantizer), _of_role(module.output_quantizer))


def _of_quantizer(quantizer: Quantizer, weight: Tensor) -> WeightGrid:
    # Only shapes and dtypes are asked for, which take no memory; a table that does not follow from x has its values.
    shadow = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    codes = shadow.new_empty(codes_shape(weight.shape, quantizer.format), dtype=torch.uint8)
    qparams = quantizer.to_storage(quantizer.qparams(shadow))
    return WeightGrid.of(QuantizedTensor(codes, qparams, quantizer.format, quantizer.granularity, weight.dtype))


def _of_role(role: Any) -> ActivationGrid | None:
    if isinstance(role, Quantizer | StoredActivation):
        return ActivationGrid(role.format, role.granularity, role.rule, role.scale_dtype)
    return None
