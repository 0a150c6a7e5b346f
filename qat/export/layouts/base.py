"""What a layout of quantized linear layers is: how one family of engines stores them, and what it can store."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.export.grids import LayerGrid, WeightGrid
from qat.nn import PackedLinear, StoredActivation
from qat.numerics.formats import IntFormat
from qat.numerics.qtensor import QuantizedTensor

Config = dict[str, Any]
_FLOAT16 = (torch.float16, torch.bfloat16)


class Misfit(NamedTuple):
    """Why a layer cannot be stored, and the options that train the nearest one that can."""

    reason: str
    mend: str


class StoredLinear(NamedTuple):
    """What a checkpoint holds of a quantized linear layer, beside its bias."""

    weight: QuantizedTensor
    input: StoredActivation | None = None


class Layout(ABC):
    """How one family of engines stores quantized linear layers in safetensors.

    A layout knows the tensors of one layer, and what `config.json` says of all. Files, the other tensors and the
    tokenizer are the same for all layouts (`qat.export.checkpoint`).

    Attributes:
        method: the `quant_method` that `config.json` names; by this a checkpoint is recognised.
        title: what people call it.
        holds_transposed: whether it takes layers that transformers stores transposed (GPT-2's Conv1D).
        package: with which transformers loads such a checkpoint; None where only other engines do.
        engines: those, and where they are tried.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    holds_transposed: ClassVar[bool] = True
    package: ClassVar[str | None] = None
    engines: ClassVar[str] = ""

    @abstractmethod
    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        """Everything that keeps a linear layer of these grids from being stored; nothing if it can be."""

    @abstractmethod
    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        """`quantization_config` for a model of the quantized linear `layers` and `others` in full precision.

        Raises:
            InputError: if the layers differ in what the layout says once for all.
        """

    @abstractmethod
    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer but its bias, named without the layer's name: `qweight`."""

    @abstractmethod
    def is_quantized(self, names: set[str]) -> bool:
        """Whether a layer that has tensors of these names is quantized."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        """The inverse of `tensors`.

        Args:
            tensors: those of one layer, named without its name.
            config: the checkpoint's `quantization_config`.
            name: of the layer.
            dtype: of the values.

        Raises:
            InputError: if they are not what the layout and `config` say.
        """


def common_misfits(grid: LayerGrid) -> Iterator[Misfit]:
    """What no layout of linear layers takes."""
    if grid.kind != "linear":
        yield Misfit(f"a quantized {grid.kind} layer", "scheme.embedding=false")
    if grid.output is not None:
        yield Misfit("a quantized output", "quantizer@scheme.output=none")


def integer_misfits(weight: WeightGrid, bits: Sequence[int]) -> Iterator[Misfit]:
    """Misfits of a weight for integers of these bits with 16-bit scales."""
    if not isinstance(weight.format, IntFormat):
        yield Misfit(f"{weight.format.name} codes", "quantizer@scheme.weight=lsq")
    if weight.format.bits not in bits:
        near = min(bits, key=lambda b: (abs(b - weight.format.bits), -b))
        yield Misfit(f"{weight.format.bits} bits", f"scheme.weight.bits={near}")
    if weight.scale not in _FLOAT16:
        yield Misfit("scales that are not 16-bit floats", "scheme.weight.scale_dtype=bfloat16")
    if weight.offset:
        yield Misfit("offsets", "quantizer@scheme.weight=lsq")


def group_misfits(weight: WeightGrid, sizes: Sequence[int], smallest: int = 1) -> Iterator[Misfit]:
    """Misfits of a weight for groups of these sizes along its rows, -1 for whole rows.

    Args:
        smallest: what the number of columns must be a multiple of.
    """
    if weight.group_size not in sizes:
        fitting = [size for size in sizes if size > 0 and weight.shape[-1] % size == 0]
        wanted = weight.group_size or 0
        near = min(fitting, key=lambda size: abs(size - wanted)) if fitting and wanted > 0 else -1
        spelled = "per_channel" if near == -1 else f"per_group_{near}"
        yield Misfit(f"scales {weight.granularity}", f"scheme.weight.granularity={spelled}")
