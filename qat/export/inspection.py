"""What a quantized checkpoint holds, layer by layer, and what of it is suspicious."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qat.export.grids import WeightGrid
from qat.nn import PackedLayer
from qat.numerics.metrics import code_use, sqnr, stored_bits
from qat.numerics.qtensor import QuantizedTensor

# Below this share of its codes a grid is larger than what it holds: a bit fewer would do.
_HALF = 0.5
# dB. Rounding to 2 bits leaves more; a weight of another model has about none.
_LEAST_SQNR = 3.0


class WeightReport(NamedTuple):
    """One quantized weight.

    name: of the layer and the Parameter.
    format, granularity, scale: how it is stored; the last is the dtype or format of its scales.
    bits_per_weight: stored, with scales, zero points and codebooks.
    code_use: share of the codes that occur.
    sqnr: in dB, beside the weight of a reference; None without one.
    flags: what is suspicious, in words.
    """

    name: str
    format: str
    granularity: str
    scale: str
    bits_per_weight: float
    code_use: float
    sqnr: float | None
    flags: tuple[str, ...]


def inspect(model: nn.Module, reference: Mapping[str, Tensor] | None = None) -> Iterator[WeightReport]:
    """Report every quantized weight of a converted `model`, one after the other; shared ones once.

    Args:
        model: as `load` returns it.
        reference: weights in full precision, by the names of their Parameters.
    """
    seen: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLayer):
            continue
        for leaf, weight in layer.weights().items():
            if weight.memory not in seen:
                seen.add(weight.memory)
                own = None if reference is None else reference.get(f"{name}.{leaf}")
                yield _report(f"{name}.{leaf}", weight.quantized(), own, reference is not None)


def _report(name: str, q: QuantizedTensor, reference: Tensor | None, compared: bool) -> WeightReport:
    grid, use = WeightGrid.of(q), code_use(q)
    scale = grid.scale if isinstance(grid.scale, torch.dtype) else grid.scale.format.name
    ratio, flags = None, list(_flags(q, use))
    if compared and (reference is None or reference.numel() != q.shape.numel()):
        flags.append("the reference has no such weight")
    elif reference is not None:
        ratio = sqnr(reference.reshape(q.shape), q.dequantize())
        if ratio < _LEAST_SQNR:
            flags.append("unlike the reference")
    stored = stored_bits(q) / q.shape.numel()
    described = q.format.name, str(q.granularity), str(scale).removeprefix("torch.")
    return WeightReport(name, *described, stored, use, ratio, tuple(flags))


def _flags(q: QuantizedTensor, use: float) -> Iterator[str]:
    """What is suspicious of a weight by itself."""
    params = q.qparams.for_view()
    if not bool(torch.isfinite(params.scale).all()):
        yield "scales that are not finite"
    elif not bool((params.scale > 0).all()):
        yield "scales that are not positive"
    if q.shape.numel() > 2**q.format.bits and use <= _HALF:
        yield f"{q.format.bits} bits, of which {math.ceil(math.log2(max(use * 2**q.format.bits, 1)))} are used"
    if not bool(q.dequantize().count_nonzero()):
        yield "nothing but zeros"
