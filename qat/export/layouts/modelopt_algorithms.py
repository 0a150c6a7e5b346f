"""How ModelOpt stores a linear layer `[out, in]`, by the `quant_algo` of its checkpoint.

    FP8                        weight float8_e4m3fn [out, in], weight_scale float32 [], input_scale float32 []
    FP8_PER_CHANNEL_PER_TOKEN  weight float8_e4m3fn [out, in], weight_scale float32 [out]
    W4A16_NVFP4                weight uint8 [out, in / 2], the first of two codes in the lower half,
                               weight_scale float8_e4m3fn [out, in / 16], weight_scale_2 float32 []
    W4A16_AWQ                  weight uint8 [out / 2, in], int4 of two outputs, the first in the lower half,
                               weight_scale [out, in / g], pre_quant_scale [in], which inputs are multiplied by: ones
    W8A16                      weight int8 [out, in], weight_scale [out]

The format is that of NVIDIA's Model Optimizer (modelopt/torch/export), and what TensorRT-LLM's and vLLM's loaders take.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import ActivationGrid, WeightGrid
from qat.export.layouts.base import Misfit, StoredLinear, group_misfits, integer_misfits
from qat.export.layouts.checks import group_count, taken
from qat.nn import PackedLinear, StoredActivation
from qat.numerics.formats import FloatFormat, IntFormat
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.qtensor import QParams, QuantizedTensor

_FP8, _FP4 = FloatFormat(4, 3), FloatFormat(2, 1)
_INT4, _INT8 = IntFormat(4), IntFormat(8)
_FLOAT16 = (torch.float16, torch.bfloat16)
_EXCLUDE = 'scheme.exclude=["THE LAYER"]'
_STATIC = ActivationGrid(_FP8, PerTensor(), None, torch.float32)
_BY_TOKEN = ActivationGrid(_FP8, PerToken(), "absmax", torch.float32)


class Algorithm(ABC):
    """One `quant_algo`.

    Attributes:
        name: of the `quant_algo`.
        input: the grid of inputs, None for inputs in full precision; `input_option` trains it.
        tensor_scale: whether a layer has a scale for its whole weight, which layers that engines fuse have to share.
        bits, type: of the weights, as `config.json` says them.
        group_sizes: those that engines take; none for scales of another kind.
    """

    name: ClassVar[str]
    input: ClassVar[ActivationGrid | None] = None
    input_option: ClassVar[str] = "quantizer@scheme.input=none"
    tensor_scale: ClassVar[bool] = False
    bits: ClassVar[int]
    type: ClassVar[str]
    group_sizes: ClassVar[tuple[int, ...]] = ()

    def misfits(self, weight: WeightGrid, input: ActivationGrid | None) -> Iterator[Misfit]:
        """What keeps a layer of these grids from being stored so."""
        if input != self.input:
            yield Misfit(_described(input), self.input_option)
        yield from self.weight_misfits(weight)

    def group_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        """What keeps the groups of a weight from being stored so."""
        if weight.group_size in self.group_sizes:
            return
        columns = weight.shape[-1]
        fitting = [size for size in self.group_sizes if columns % size == 0]
        option = f"scheme.weight.granularity=per_group_{fitting[-1]}" if fitting else _EXCLUDE
        yield Misfit(f"scales {weight.granularity} on rows of {columns}", option)

    @abstractmethod
    def weight_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        """What keeps a weight of this grid from being stored so."""

    @abstractmethod
    def tensors(self, layer: PackedLinear) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer but its bias."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], group_size: int, name: str, dtype: torch.dtype) -> StoredLinear:
        """The inverse of `tensors`.

        Args:
            group_size: what the checkpoint says, one of `group_sizes`; 0 where it says nothing.
        """

    def group_size(self, weight: WeightGrid) -> int:
        """What a checkpoint says of its groups; 0 for nothing."""
        return (weight.group_size or 0) if self.group_sizes else 0


class Fp8(Algorithm):
    """One scale for a weight, one calibrated scale for its inputs."""

    name = "FP8"
    input = _STATIC
    input_option = "quantizer@scheme.input=fp8_static"
    tensor_scale = True
    bits, type = 8, "float"

    def weight_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        yield from _fp8_misfits(weight)
        if weight.granularity != PerTensor():
            yield Misfit(f"scales {weight.granularity}", "scheme.weight.granularity=per_tensor")

    def tensors(self, layer: PackedLinear) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        yield "weight", q.codes.view(torch.float8_e4m3fn)
        yield "weight_scale", _plain(q.qparams.scale).reshape(())
        yield "input_scale", layer.input_quantizer.get_buffer("scale").reshape(())

    def restore(self, tensors: Mapping[str, Tensor], group_size: int, name: str, dtype: torch.dtype) -> StoredLinear:
        scale = _scalar(tensors, "weight_scale", name).reshape(1, 1)
        input_scale = _scalar(tensors, "input_scale", name).reshape(1)
        static = _activation(_STATIC, input_scale)
        weight = QuantizedTensor(_fp8_codes(tensors, name), QParams(scale), _FP8, PerTensor(), dtype)
        return StoredLinear(weight, static)


class Fp8PerChannelPerToken(Algorithm):
    """A scale for each output, inputs with a scale for each token, found as they come."""

    name = "FP8_PER_CHANNEL_PER_TOKEN"
    input = _BY_TOKEN
    input_option = "quantizer@scheme.input=fp8_token"
    bits, type = 8, "float"

    def weight_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        yield from _fp8_misfits(weight)
        yield from group_misfits(weight, [-1])

    def tensors(self, layer: PackedLinear) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        yield "weight", q.codes.view(torch.float8_e4m3fn)
        yield "weight_scale", _plain(q.qparams.scale).flatten()

    def restore(self, tensors: Mapping[str, Tensor], group_size: int, name: str, dtype: torch.dtype) -> StoredLinear:
        codes = _fp8_codes(tensors, name)
        scale = taken(tensors, "weight_scale", name, [torch.float32], (len(codes),)).view(-1, 1)
        weight = QuantizedTensor(codes, QParams(scale), _FP8, PerChannel(), dtype)
        return StoredLinear(weight, _activation(_BY_TOKEN))


class NvFp4(Algorithm):
    """Blocks of 16 4-bit floats with fp8 scales, and one scale for all of those."""

    name = "W4A16_NVFP4"
    tensor_scale = True
    group_sizes = (16,)
    bits, type = 4, "float"

    def weight_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        nested = weight.scale
        own = isinstance(nested, WeightGrid) and (nested.format, nested.granularity, nested.scale) == (
            _FP8, PerTensor(), torch.float32,
        )  # fmt: skip
        if weight.format != _FP4 or not own:
            what = f"{weight.format.name} codes" if weight.format != _FP4 else "scales that are not those of NVFP4"
            yield Misfit(what, "quantizer@scheme.weight=nvfp4")
        yield from self.group_misfits(weight)

    def tensors(self, layer: PackedLinear) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        scale = q.qparams.scale
        assert isinstance(scale, QuantizedTensor)
        yield "weight", q.codes[:, ::2] | q.codes[:, 1::2] << 4
        yield "weight_scale", scale.codes.reshape(q.shape[0], -1).view(torch.float8_e4m3fn)
        yield "weight_scale_2", _plain(scale.qparams.scale).reshape(())

    def restore(self, tensors: Mapping[str, Tensor], group_size: int, name: str, dtype: torch.dtype) -> StoredLinear:
        packed = taken(tensors, "weight", name, [torch.uint8], (None, None))
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        groups = group_count(codes.shape[1], group_size, name)
        blocks = taken(tensors, "weight_scale", name, [torch.float8_e4m3fn], (len(codes), groups))
        second = _scalar(tensors, "weight_scale_2", name).reshape(1, 1)
        scale = QuantizedTensor(blocks.view(torch.uint8), QParams(second), _FP8, PerTensor(), torch.float32)
        return StoredLinear(QuantizedTensor(codes, QParams(scale), _FP4, PerGroup(group_size), dtype))


class Int4Awq(Algorithm):
    """Symmetric integers of 4 bits in groups."""

    name = "W4A16_AWQ"
    group_sizes = (64, 128)
    bits, type = 4, "int"

    def weight_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        yield from integer_misfits(weight, [_INT4.bits])
        if weight.zero_point:
            yield Misfit("zero points", "scheme.weight.symmetric=true")
        yield from self.group_misfits(weight)
        if weight.shape[0] % 2:
            yield Misfit(f"{weight.shape[0]} outputs, which do not fill bytes of 2", _EXCLUDE)

    def tensors(self, layer: PackedLinear) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        nibbles = (q.codes & 15).to(torch.uint8)
        yield "weight", nibbles[::2] | nibbles[1::2] << 4
        yield "weight_scale", _plain(q.qparams.scale).reshape(q.shape[0], -1)
        yield "pre_quant_scale", torch.ones(q.shape[1], dtype=q.dtype)

    def restore(self, tensors: Mapping[str, Tensor], group_size: int, name: str, dtype: torch.dtype) -> StoredLinear:
        packed = taken(tensors, "weight", name, [torch.uint8], (None, None))
        nibbles = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).to(torch.int8)
        codes = (nibbles ^ 8) - 8
        groups = group_count(codes.shape[1], group_size, name)
        scale = taken(tensors, "weight_scale", name, _FLOAT16, (len(codes), groups))
        _check_ones(tensors, name, codes.shape[1])
        return StoredLinear(QuantizedTensor(codes, QParams(scale), _INT4, PerGroup(group_size), dtype))


class Int8(Algorithm):
    """Symmetric integers of 8 bits, a scale for each output."""

    name = "W8A16"
    bits, type = 8, "int"

    def weight_misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        yield from integer_misfits(weight, [_INT8.bits])
        if weight.zero_point:
            yield Misfit("zero points", "scheme.weight.symmetric=true")
        yield from group_misfits(weight, [-1])

    def tensors(self, layer: PackedLinear) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        yield "weight", q.codes
        yield "weight_scale", _plain(q.qparams.scale).flatten()

    def restore(self, tensors: Mapping[str, Tensor], group_size: int, name: str, dtype: torch.dtype) -> StoredLinear:
        codes = taken(tensors, "weight", name, [torch.int8], (None, None))
        scale = taken(tensors, "weight_scale", name, _FLOAT16, (len(codes),)).view(-1, 1)
        return StoredLinear(QuantizedTensor(codes, QParams(scale), _INT8, PerChannel(), dtype))


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm for algorithm in (Fp8(), Fp8PerChannelPerToken(), NvFp4(), Int4Awq(), Int8())
}


def nearest_algorithm(weight: WeightGrid) -> Algorithm:
    """The one that stores a weight of this grid, or whose grid is nearest."""
    if weight.format == _FP8:
        return ALGORITHMS["FP8" if weight.granularity == PerTensor() else "FP8_PER_CHANNEL_PER_TOKEN"]
    if isinstance(weight.format, FloatFormat):
        return ALGORITHMS["W4A16_NVFP4" if weight.format.bits == _FP4.bits else "FP8_PER_CHANNEL_PER_TOKEN"]
    return ALGORITHMS["W4A16_AWQ" if weight.format.bits <= 5 else "W8A16"]


def _described(input: ActivationGrid | None) -> str:
    if input is None:
        return "inputs in full precision"
    return f"{'static' if input.rule is None else 'dynamic'} {input.format.name} inputs {input.granularity}"


def _fp8_misfits(weight: WeightGrid) -> Iterator[Misfit]:
    if weight.format != _FP8:
        yield Misfit(f"{weight.format.name} codes", "quantizer@scheme.weight=fp8 scheme.weight.bits=8")
    if weight.scale != torch.float32:
        yield Misfit("scales that are not float32", "scheme.weight.scale_dtype=float32")


def _plain(scale: Tensor | QuantizedTensor) -> Tensor:
    assert isinstance(scale, Tensor)
    return scale


def _scalar(tensors: Mapping[str, Tensor], leaf: str, name: str) -> Tensor:
    """A float32 number, of which some tools make a tensor of one dimension."""
    shape = [1] if leaf in tensors and tensors[leaf].ndim else []
    return taken(tensors, leaf, name, [torch.float32], shape)


def _fp8_codes(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return taken(tensors, "weight", name, [torch.float8_e4m3fn], (None, None)).view(torch.uint8)


def _activation(grid: ActivationGrid, scale: Tensor | None = None) -> StoredActivation:
    """An input on `grid`, with the static `scale` `[1]`."""
    description = {
        "format": grid.format.name,
        "granularity": str(grid.granularity),
        "rule": grid.rule,
        "scale_dtype": "float32",
    }
    if scale is None:
        return StoredActivation(description)
    stored = StoredActivation(description | {"scale": {"shape": [1], "dtype": "float32"}})
    stored.get_buffer("scale").copy_(scale)
    return stored


def _check_ones(tensors: Mapping[str, Tensor], name: str, columns: int) -> None:
    """Refuse inputs that are multiplied by anything: no grid here has that."""
    if "pre_quant_scale" not in tensors:
        return
    factors = taken(tensors, "pre_quant_scale", name, (*_FLOAT16, torch.float32), (columns,))
    if (factors != 1).any():
        raise InputError(f"{name} multiplies its inputs by {name}.pre_quant_scale, which no grid here does.")
