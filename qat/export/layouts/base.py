"""What a layout of quantized linear layers is: how one family of engines stores them, and what it can store."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qat.export.grids import LayerGrid, WeightGrid
from qat.nn import PackedLinear, StoredActivation
from qat.nn.kv_quantizer import KVQuantizer
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


class CacheLayout(ABC):
    """How one family of engines stores the grids of keys and values."""

    @abstractmethod
    def misfits(self, kv: KVQuantizer, dtype: torch.dtype) -> Iterator[Misfit]:
        """Everything that keeps the cache of one attention layer, in a model of `dtype`, from being stored."""

    @abstractmethod
    def config(self, layers: Mapping[str, KVQuantizer]) -> Config:
        """What `quantization_config` says of the attention `layers`.

        Raises:
            InputError: if the layers differ in what is said once for all.
        """

    @abstractmethod
    def tensors(self, kv: KVQuantizer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The tensors of an attention layer, named without its name."""

    @abstractmethod
    def is_said(self, config: Config) -> bool:
        """Whether `quantization_config` says that caches are quantized."""

    @abstractmethod
    def is_quantized(self, names: set[str]) -> bool:
        """Whether an attention layer that has tensors of these names has a quantized cache."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> KVQuantizer:
        """The inverse of `tensors`; arguments as for `Layout.restore`.

        Raises:
            InputError: if they are not what the layout and `config` say.
        """


class Layout(ABC):
    """How one family of engines stores quantized linear layers in safetensors.

    A layout knows the tensors of one layer, and what `config.json` says of all. Files, the other tensors and the
    tokenizer are the same for all layouts (`qat.export.checkpoint`).

    Attributes:
        method: the `quant_method` that `config.json` names; by this a checkpoint is recognised.
        title: what people call it.
        holds_transposed: whether it takes layers that transformers stores transposed (GPT-2's Conv1D).
        cache: of keys and values, where it has a place for them.
        package: with which transformers loads such a checkpoint; None where only other engines do.
        engines: those.
        exact_engine: whether the engine multiplies the very values, so that only its sums may run in another order.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    holds_transposed: ClassVar[bool] = True
    cache: ClassVar[CacheLayout | None] = None
    package: ClassVar[str | None] = None
    engines: ClassVar[str] = ""
    exact_engine: ClassVar[bool] = True

    @classmethod
    def wrote(cls, config: Config) -> bool:
        """Whether a checkpoint with this `quantization_config` is in this layout."""
        return config.get("quant_method") == cls.method

    @abstractmethod
    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        """Everything that keeps a linear layer of these grids from being stored; nothing if it can be."""

    def joint_misfits(self, grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
        """What keeps layers that fit one by one out of the same checkpoint.

        Args:
            grids: of the quantized layers, by name.
            others: linear layers in full precision.
        """
        return iter(())

    @abstractmethod
    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        """`quantization_config` for a model of the quantized linear `layers` and `others` in full precision.

        Raises:
            InputError: if the layers differ in what the layout says once for all.
        """

    @abstractmethod
    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a layer but its bias, named without the layer's name: `qweight`."""

    def files(self, config: Config) -> Mapping[str, str]:
        """Texts that belong into the folder beside `config.json`, by the names of their files."""
        return {}

    def split(self, name: str) -> tuple[str, str]:
        """The layer that a tensor of a checkpoint belongs to, and the tensor's name within it."""
        layer, _, leaf = name.rpartition(".")
        return layer, leaf

    @abstractmethod
    def is_quantized(self, names: set[str]) -> bool:
        """Whether a layer that has tensors of these names is quantized."""

    def loading(self, config: Config, dtype: torch.dtype) -> dict[str, Any]:
        """The options with which transformers loads a checkpoint, whose model is in `dtype`.

        Raises:
            NotInstalled: where it computes something else, and another engine is to be asked.
        """
        return {}

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
        yield Misfit(f"a quantized {grid.kind} layer", "scheme.embedding=false scheme.head=false")
    if grid.output is not None:
        yield Misfit("a quantized output", "quantizer@scheme.output=none")


def weight_only_misfits(grid: LayerGrid) -> Iterator[Misfit]:
    """What no layout takes that stores linear layers whose activations are in full precision."""
    yield from common_misfits(grid)
    if grid.input is not None:
        yield Misfit("a quantized input", "quantizer@scheme.input=none")


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


def group_misfits(weight: WeightGrid, sizes: Sequence[int]) -> Iterator[Misfit]:
    """Misfits of a weight for groups of these sizes along its rows, -1 for whole rows."""
    if weight.group_size not in sizes:
        fitting = [size for size in sizes if size > 0 and weight.shape[-1] % size == 0]
        wanted = weight.group_size or 0
        near = min(fitting, key=lambda size: abs(size - wanted)) if fitting and wanted > 0 else -1
        spelled = "per_channel" if near == -1 else f"per_group_{near}"
        yield Misfit(f"scales {weight.granularity}", f"scheme.weight.granularity={spelled}")


def name_misfits(grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
    """Misfits of names for engines that look for those of `others` anywhere in the name of a layer."""
    for other in others:
        for name in grids:
            if other in name:
                yield Misfit(f"{other} in full precision, which engines would take for {name} too", "export=gptq")


def boundary_misfits(grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
    """Misfits of names for transformers, which looks for those of `others` at either end of the name of a layer."""
    for other in others:
        for name in grids:
            if name.startswith(f"{other}.") or name.endswith(other):
                yield Misfit(f"{other} in full precision, which would be taken for {name} too", "export=native")
