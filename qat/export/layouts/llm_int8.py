"""The layout of bitsandbytes checkpoints in 8 bits (LLM.int8), which transformers reads without quantizing anything.

For a layer `[out, in]`:

    weight         int8 [out, in]
    SCB            float32 [out]   127 times the scales
    weight_format  uint8 []        0: row by row

The library quantizes inputs too, each token to 8 bits by its largest number, so layers without quantized inputs would
compute something else there than in training. Columns of outliers, which it can leave in 16 bits, are not trained
here: `llm_int8_threshold` is 0, for none.

It dequantizes a weight as code * SCB * fl(1 / 127). With scales of 8 bits (bfloat16) code * SCB is exact, and as
fl(1 / 127) is within 2^-28 of 1 / 127, so is the result: code * scale to the bit. Scales of more bits go astray.

LLM.int8 (arXiv 2208.07339); the format is that of `Linear8bitLt`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import ActivationGrid, LayerGrid
from qat.export.layouts.base import (
    Config,
    Misfit,
    StoredLinear,
    common_misfits,
    group_misfits,
)
from qat.export.layouts.bitsandbytes import BitsAndBytesLayout
from qat.export.layouts.checks import option, taken
from qat.nn import PackedLinear, StoredActivation
from qat.numerics.formats import IntFormat
from qat.numerics.granularity import PerChannel, PerToken
from qat.numerics.qtensor import QParams, QuantizedTensor

_INT8 = IntFormat(8)
_INPUT = ActivationGrid(_INT8, PerToken(), "absmax", torch.float32)
_STEPS = 127
_ROW_BY_ROW = 0


class LlmInt8(BitsAndBytesLayout):
    """Weights of 8 bits with a bfloat16 scale for each output, inputs of 8 bits with one for each token."""

    title = "LLM.int8"

    @classmethod
    def wrote(cls, config: Config) -> bool:
        return super().wrote(config) and bool(config.get("load_in_8bit"))

    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        yield from common_misfits(grid)
        if grid.input != _INPUT:
            what = "inputs in full precision" if grid.input is None else "inputs on another grid than int8 per_token"
            yield Misfit(what, "quantizer@scheme.input=minmax_token")
        weight = grid.weights["weight"]
        if weight.format != _INT8 or weight.zero_point or weight.offset:
            what = f"{weight.format.name} codes" + (" with zero points" if weight.zero_point else "")
            yield Misfit(what, "quantizer@scheme.weight=minmax scheme.weight.bits=8")
        if weight.scale != torch.bfloat16:
            yield Misfit("scales that are not bfloat16", "scheme.weight.scale_dtype=bfloat16")
        yield from group_misfits(weight, [-1])

    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        return {
            "quant_method": self.method,
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 0.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(others),
        }

    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        assert isinstance(q.qparams.scale, Tensor)
        yield "weight", q.codes
        yield "SCB", q.qparams.scale.flatten().float() * _STEPS
        yield "weight_format", torch.tensor(_ROW_BY_ROW, dtype=torch.uint8)

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        option(config, "load_in_8bit", [True])
        option(config, "llm_int8_threshold", [0.0])
        codes = taken(tensors, "weight", name, [torch.int8], (None, None))
        if "weight_format" in tensors and tensors["weight_format"] != _ROW_BY_ROW:
            raise InputError(f"{name} is stored in the order of a GPU: save it again by a newer bitsandbytes.")
        exact = taken(tensors, "SCB", name, [torch.float32], (len(codes),)) / _STEPS
        scale = exact.to(torch.bfloat16)
        if not torch.equal(scale.float(), exact):
            raise InputError(f"{name} has scales of more bits than bfloat16, with which no grid here is exact.")
        weight = QuantizedTensor(codes, QParams(scale.view(-1, 1)), _INT8, PerChannel(), dtype)
        description = {"format": "int8", "granularity": "per_token", "rule": "absmax", "scale_dtype": "float32"}
        return StoredLinear(weight, StoredActivation(description))
