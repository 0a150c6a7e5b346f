"""The layout of GPTQ checkpoints, which vLLM, LMDeploy, TensorRT-LLM and GPTQModel read.

For a layer `[out, in]` of b bits and groups of g columns:

    qweight  int32 [in * b / 32, out]      codes from the lowest on; a column of words holds the codes of one output
    qzeros   int32 [in / g, out * b / 32]  zero points, minus one in the first version of the format
    scales   [in / g, out]
    g_idx    int32 [in]                    the group of each column

GPTQ (arXiv 2210.17323); the format is that of AutoGPTQ, its second version that of GPTQModel.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import LayerGrid, WeightGrid
from qat.export.layouts.base import (
    Config,
    Layout,
    Misfit,
    StoredLinear,
    group_misfits,
    integer_misfits,
    weight_only_misfits,
)
from qat.export.layouts.words import WORD, from_words, signed, to_words, unsigned
from qat.nn import PackedLinear
from qat.numerics.formats import IntFormat
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.qtensor import QParams, QuantizedTensor

_BITS = (2, 3, 4, 8)
_GROUPS = (-1, 32, 64, 128)
_HEAD = "lm_head"
# Older tools stored zero points wrongly. GPTQModel takes them from no other producer, so the entry names the version
# whose format this is.
_FORMAT_OF = "gptqmodel:0.9.0"


class Gptq(Layout):
    """GPTQ, asymmetric or symmetric, layers of several bits in one checkpoint included (`dynamic`)."""

    method = "gptq"
    title = "GPTQ"
    engines = "vLLM and GPTQModel"

    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        yield from weight_only_misfits(grid)
        weight = grid.weights["weight"]
        yield from integer_misfits(weight, _BITS)
        yield from group_misfits(weight, _GROUPS)
        for size, what in zip(weight.shape, ("outputs", "inputs"), strict=True):
            if size % WORD:
                yield Misfit(f"{size} {what}, which do not fill words of 32", 'scheme.exclude=["THE LAYER"]')

    def joint_misfits(self, grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
        if len({grid.weights["weight"].zero_point for grid in grids.values()}) > 1:
            yield Misfit("zero points in some layers and none in others", "quantizer@scheme.weight=lsq")

    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        own = {name: _own(layer) for name, layer in layers.items()}
        common = max(own.values(), key=list(own.values()).count)
        dynamic: Config = {f"-:^{re.escape(name)}$": {} for name in others if name != _HEAD}
        dynamic |= {f"+:^{re.escape(name)}$": options for name, options in own.items() if options != common}
        config = {"quant_method": self.method, **common, "desc_act": False, "lm_head": _HEAD in layers}
        config["checkpoint_format"] = "gptq" if all(map(_fits_first_version, layers.values())) else "gptq_v2"
        if not common["sym"]:
            config["meta"] = {"quantizer": [_FORMAT_OF]}
        return config | ({"dynamic": dynamic} if dynamic else {})

    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        assert isinstance(q.format, IntFormat)
        assert isinstance(q.qparams.scale, Tensor)
        (rows, columns), bits = q.shape, q.format.bits
        scale = q.qparams.scale.reshape(rows, -1)
        zeros = _zero_points(q, scale) - _less_one(config)
        yield "qweight", to_words(unsigned(q.codes, q.format), bits).t().contiguous()
        yield "qzeros", to_words(zeros.t().to(torch.uint8), bits)
        yield "scales", scale.t().contiguous()
        yield "g_idx", (torch.arange(columns) // (columns // scale.shape[1])).to(torch.int32)

    def is_quantized(self, names: set[str]) -> bool:
        return "qweight" in names

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        options = config | _override(config.get("dynamic") or {}, name)
        bits, symmetric = options["bits"], options["sym"]
        format = IntFormat(bits, signed=symmetric)
        codes = signed(from_words(tensors["qweight"].t(), bits), format)
        scale = tensors["scales"].t().contiguous()
        groups = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
        if "g_idx" in tensors and not torch.equal(tensors["g_idx"].long(), groups):
            raise InputError(
                f"{name} has its columns in the order of their activations, which no grid here has: quantize the model "
                "again with desc_act=false."
            )
        stored = from_words(tensors["qzeros"], bits).t().to(torch.int16)
        zeros = (stored + _less_one(config)) % 2**bits
        if symmetric and (zeros != 2 ** (bits - 1)).any():
            raise InputError(f"{name} has zero points other than {2 ** (bits - 1)}, and config.json says sym=true.")
        granularity = PerChannel() if scale.shape[1] == 1 else PerGroup(codes.shape[1] // scale.shape[1])
        zero_point = None if symmetric else zeros.to(torch.uint8)
        return StoredLinear(QuantizedTensor(codes, QParams(scale, zero_point), format, granularity, dtype))


def _own(layer: PackedLinear) -> dict[str, Any]:
    """What a checkpoint says of this layer, if not of all."""
    grid = WeightGrid.of(layer.weight.without_codes())
    return {"bits": grid.format.bits, "group_size": grid.group_size, "sym": not grid.zero_point}


def _zero_points(q: QuantizedTensor, scale: Tensor) -> Tensor:
    """Zero points of unsigned codes, int16 `[out, groups]`."""
    if q.qparams.zero_point is not None:
        return q.qparams.zero_point.reshape_as(scale).to(torch.int16)
    return torch.full_like(scale, -q.format.code_range[0], dtype=torch.int16)


def _fits_first_version(layer: PackedLinear) -> bool:
    """Whether no zero point is zero: one less is then no number that engines agree on."""
    zero_point = layer.weight.without_codes().qparams.zero_point
    return zero_point is None or bool((zero_point > 0).all())


def _override(dynamic: Config, name: str) -> Config:
    """What `dynamic` says of the layer `name`."""
    for pattern, options in dynamic.items():
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            return dict(options)
    return {}


def _less_one(config: Config) -> int:
    """What zero points are stored minus."""
    return int(config.get("checkpoint_format", "gptq") == "gptq")
