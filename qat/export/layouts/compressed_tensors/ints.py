"""Integers: `pack-quantized`, dense in 32-bit words, and `int-quantized`, a byte a code.

For a layer `[out, in]` of b bits and G groups a row:

    weight_packed      int32 [out, ceil(in b / 32)]  pack-quantized: codes from the lowest on, densely along rows
    weight_shape       int64 [2]                     pack-quantized: out and in
    weight             int8 [out, in]                int-quantized: signed codes
    weight_scale       [out, G]; [1] for the tensor
    weight_zero_point  int32 [ceil(out b / 32), G]   pack-quantized: words along the outputs
                       int8, shaped like the scale   int-quantized: signed, as codes

Only asymmetric layers have zero points.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.errors import InputError
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.compressed_tensors.arguments import Arguments, sharing
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.scales import DTYPES, restored, scale_misfits
from qat.export.layouts.compressed_tensors.store import Store
from qat.export.layouts.words import WORD, from_words, signed, to_words, unsigned
from qat.numerics.formats import IntFormat
from qat.numerics.granularity import PerTensor
from qat.numerics.qtensor import QParams, QuantizedTensor


class Ints(Store):
    """What both formats of integers have in common."""

    def misfits(self, weight: WeightGrid) -> Iterator[Misfit]:
        if not isinstance(weight.format, IntFormat):
            yield Misfit(f"{weight.format.name} codes", "quantizer@scheme.weight=lsq")
        yield from scale_misfits(weight)
        if weight.group_size is None and not self._holds_tensor(weight):
            yield Misfit(f"scales {weight.granularity}", "scheme.weight.granularity=per_channel")

    @abstractmethod
    def _holds_tensor(self, weight: WeightGrid) -> bool:
        """Whether one scale for the whole `weight` is held, where it has that."""

    def arguments(self, weight: WeightGrid) -> Arguments:
        return Arguments("int", weight.format.bits, symmetric=not weight.zero_point, **sharing(weight.granularity))

    def tensors(self, q: QuantizedTensor) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(q.format, IntFormat)
        assert isinstance(q.qparams.scale, Tensor)
        shape = (1,) if isinstance(q.granularity, PerTensor) else (q.shape[0], -1)
        yield from self._codes(unsigned(q.codes, q.format), q.format.bits)
        yield "weight_scale", q.qparams.scale.reshape(shape).to(q.dtype)
        if q.qparams.zero_point is not None:
            yield "weight_zero_point", self._zero_points(q.qparams.zero_point.reshape(shape), q.format.bits)

    @abstractmethod
    def _codes(self, codes: Tensor, bits: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of unsigned codes `[out, in]`, uint8."""

    @abstractmethod
    def _zero_points(self, zero_point: Tensor, bits: int) -> Tensor:
        """Zero points of unsigned codes, shaped like the scale, as stored."""

    def restore(self, leaves: Leaves, said: Arguments, dtype: torch.dtype) -> QuantizedTensor:
        name, granularity = leaves.name, said.granularity(leaves.name)
        if said.type != "int" or said.num_bits not in range(2, 9):
            raise InputError(f"{name} is {self.format} of type {said.type} and {said.num_bits} bits: no such integers.")
        format = IntFormat(said.num_bits, signed=said.symmetric)
        codes = signed(self._restored_codes(leaves, said.num_bits), format)
        shape = granularity.param_shape(codes.shape)
        stored = (1,) if isinstance(granularity, PerTensor) else shape
        scale = restored(leaves.take("weight_scale", *DTYPES, shape=stored), dtype, name).reshape(shape)
        zero_point = None if said.symmetric else self._restored_zeros(leaves, said.num_bits, stored).reshape(shape)
        return QuantizedTensor(codes, QParams(scale, zero_point), format, granularity, dtype)

    @abstractmethod
    def _restored_codes(self, leaves: Leaves, bits: int) -> Tensor:
        """Unsigned codes, uint8."""

    @abstractmethod
    def _restored_zeros(self, leaves: Leaves, bits: int, shape: tuple[int, ...]) -> Tensor:
        """Zero points of unsigned codes, uint8."""


class PackQuantized(Ints):
    """Weights alone: engines know groups and channels of packed integers, and no scale for the whole tensor."""

    format = "pack-quantized"

    def _holds_tensor(self, weight: WeightGrid) -> bool:
        return False

    def _codes(self, codes: Tensor, bits: int) -> Iterator[tuple[str, Tensor]]:
        yield "weight_packed", _pack(codes, bits)
        yield "weight_shape", torch.tensor(codes.shape)

    def _zero_points(self, zero_point: Tensor, bits: int) -> Tensor:
        return _pack(zero_point.t(), bits).t().contiguous()

    def _restored_codes(self, leaves: Leaves, bits: int) -> Tensor:
        rows, columns = leaves.take("weight_shape", torch.int64, torch.int32, shape=(2,)).tolist()
        words = leaves.take("weight_packed", torch.int32, shape=(rows, math.ceil(columns * bits / WORD)))
        return _unpack(words, bits, columns)

    def _restored_zeros(self, leaves: Leaves, bits: int, shape: tuple[int, ...]) -> Tensor:
        rows, groups = shape
        words = leaves.take("weight_zero_point", torch.int32, shape=(math.ceil(rows * bits / WORD), groups))
        return _unpack(words.t().contiguous(), bits, rows).t().contiguous()


class IntQuantized(Ints):
    """Beside quantized inputs, of W8A8 and W4A8 alike."""

    format = "int-quantized"
    inputs = ("int", "float")

    def _holds_tensor(self, weight: WeightGrid) -> bool:
        return isinstance(weight.granularity, PerTensor)

    def _codes(self, codes: Tensor, bits: int) -> Iterator[tuple[str, Tensor]]:
        yield "weight", signed(codes, IntFormat(bits))

    def _zero_points(self, zero_point: Tensor, bits: int) -> Tensor:
        return signed(zero_point, IntFormat(bits))

    def _restored_codes(self, leaves: Leaves, bits: int) -> Tensor:
        return _counted(leaves.take("weight", torch.int8), bits, leaves.name)

    def _restored_zeros(self, leaves: Leaves, bits: int, shape: tuple[int, ...]) -> Tensor:
        return _counted(leaves.take("weight_zero_point", torch.int8, shape=shape), bits, leaves.name)


def _counted(stored: Tensor, bits: int, name: str) -> Tensor:
    """Signed codes as unsigned ones, uint8."""
    format = IntFormat(bits)
    low, high = format.code_range
    if stored.numel() and (stored.amin() < low or stored.amax() > high):
        raise InputError(f"{name} has integers beyond the {bits} bits that its config.json says.")
    return unsigned(stored, format)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, n]` in words `[rows, ceil(n bits / 32)]`; what is left of the last one is zero."""
    columns = codes.shape[1]
    padded = F.pad(codes, (0, -columns % WORD))
    return to_words(padded, bits)[:, : math.ceil(columns * bits / WORD)].contiguous()


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `_pack`."""
    whole = F.pad(words, (0, math.ceil(columns / WORD) * bits - words.shape[1]))
    return from_words(whole, bits)[:, :columns].contiguous()
