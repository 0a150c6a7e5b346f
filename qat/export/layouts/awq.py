"""The layout of AWQ checkpoints ("GEMM"), which vLLM, SGLang, LMDeploy and GPTQModel read.

For a layer `[out, in]` of 4 bits and groups of g columns:

    qweight  int32 [in, out / 8]      codes from 0 to 15; a word holds eight outputs of one column
    qzeros   int32 [in / g, out / 8]  zero points, packed as the codes
    scales   [in / g, out]

Nibble i of a word, from the lowest, belongs to output `_ORDER[i]` of its eight. Symmetric codes have 8 as zero point.
AWQ (arXiv 2306.00978); the format is that of AutoAWQ.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qat.export.grids import LayerGrid, WeightGrid
from qat.export.layouts.base import (
    Config,
    Layout,
    Misfit,
    StoredLinear,
    group_misfits,
    integer_misfits,
    name_misfits,
    weight_only_misfits,
)
from qat.export.layouts.checks import group_count, option, taken
from qat.export.layouts.words import WORD, from_words, signed, to_words, unsigned
from qat.nn import PackedLinear
from qat.numerics.formats import IntFormat
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.qtensor import QParams, QuantizedTensor

_BITS = 4
_GROUPS = (-1, 32, 64, 128)
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_OUTPUTS = WORD // _BITS
_MIDDLE = 2 ** (_BITS - 1)
_HEAD = "lm_head"


class Awq(Layout):
    """AWQ with 4 bits; each layer symmetric or not, all of one group size."""

    method = "awq"
    title = "AWQ"
    engines = "vLLM and GPTQModel"

    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        yield from weight_only_misfits(grid)
        weight = grid.weights["weight"]
        yield from integer_misfits(weight, [_BITS])
        yield from group_misfits(weight, _GROUPS)
        if weight.shape[0] % _OUTPUTS:
            yield Misfit(
                f"{weight.shape[0]} outputs, which do not fill words of {_OUTPUTS}", 'scheme.exclude=["THE LAYER"]'
            )

    def joint_misfits(self, grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
        sizes = dict.fromkeys(grid.weights["weight"].group_size for grid in grids.values())
        if len(sizes) > 1:
            found = ", ".join("whole rows" if size == -1 else str(size) for size in sizes)
            yield Misfit(f"groups of several sizes: {found}", "~scheme.rules")
        yield from name_misfits(grids, others)

    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        group_size = WeightGrid.of(next(iter(layers.values())).weight.without_codes()).group_size
        config = {
            "quant_method": self.method,
            "bits": _BITS,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(others),
        }
        return config | ({"lm_head": True} if _HEAD in layers else {})

    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        assert isinstance(q.format, IntFormat)
        assert isinstance(q.qparams.scale, Tensor)
        scale = q.qparams.scale.reshape(q.shape[0], -1)
        middle = torch.full_like(scale, _MIDDLE, dtype=torch.uint8)
        zeros = middle if q.qparams.zero_point is None else q.qparams.zero_point.view_as(scale)
        yield "qweight", _to_words(unsigned(q.codes, q.format))
        yield "qzeros", _to_words(zeros.to(torch.uint8))
        yield "scales", scale.t().contiguous()

    def is_quantized(self, names: set[str]) -> bool:
        return "qweight" in names

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        option(config, "bits", [_BITS])
        option(config, "version", ["gemm", "GEMM"])
        size = option(config, "group_size", int)
        qweight = taken(tensors, "qweight", name, [torch.int32], (None, None))
        columns, rows = qweight.shape[0], qweight.shape[1] * _OUTPUTS
        groups = group_count(columns, size, name)
        scales = taken(tensors, "scales", name, [torch.float16, torch.bfloat16], (groups, rows))
        zeros = _from_words(taken(tensors, "qzeros", name, [torch.int32], (groups, rows // _OUTPUTS)))
        symmetric = bool((zeros == _MIDDLE).all())
        format = IntFormat(_BITS, signed=symmetric)
        qparams = QParams(scales.t().contiguous(), None if symmetric else zeros)
        granularity = PerChannel() if size == -1 else PerGroup(size)
        return StoredLinear(QuantizedTensor(signed(_from_words(qweight), format), qparams, format, granularity, dtype))


def _to_words(rows: Tensor) -> Tensor:
    """Codes `[out, n]`, uint8, as words `[n, out / 8]`."""
    eights = rows.t().reshape(rows.shape[1], -1, _OUTPUTS)[..., list(_ORDER)]
    return to_words(eights.flatten(1), _BITS)


def _from_words(words: Tensor) -> Tensor:
    """The inverse of `_to_words`."""
    nibbles = from_words(words, _BITS).view(words.shape[0], -1, _OUTPUTS)
    eights = torch.empty_like(nibbles)
    eights[..., list(_ORDER)] = nibbles
    return eights.flatten(1).t().contiguous()
