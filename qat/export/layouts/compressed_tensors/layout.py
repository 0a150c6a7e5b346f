"""The layout of compressed-tensors checkpoints: config groups, and which format each of them has.

A group holds the layers whose weights and inputs have the same grid. Where groups have different formats, the config
names `mixed-precision` above, and each group its own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.consumers import NotInstalled
from qat.export.grids import LayerGrid, WeightGrid
from qat.export.layouts.base import Config, Layout, Misfit, StoredLinear, common_misfits
from qat.export.layouts.compressed_tensors import nvfp4
from qat.export.layouts.compressed_tensors.arguments import Arguments
from qat.export.layouts.compressed_tensors.cache import StaticCache
from qat.export.layouts.compressed_tensors.floats import FloatQuantized
from qat.export.layouts.compressed_tensors.inputs import input_arguments, input_misfits, input_tensors, restored_input
from qat.export.layouts.compressed_tensors.ints import IntQuantized, PackQuantized
from qat.export.layouts.compressed_tensors.leaves import Leaves
from qat.export.layouts.compressed_tensors.microscaling import MXFP4, MXFP6, MXFP8
from qat.export.layouts.compressed_tensors.nvfp4 import NvFp4
from qat.export.layouts.compressed_tensors.store import Store
from qat.nn import PackedLinear, StoredActivation
from qat.numerics.formats import FloatFormat

_MICROSCALING = {store.grid.bits: store for store in (MXFP4, MXFP6, MXFP8)}
_STORES: dict[str, Store] = {
    store.format: store
    for store in (PackQuantized(), IntQuantized(), FloatQuantized(), NvFp4(), *_MICROSCALING.values())
}
_MIXED = "mixed-precision"
_LINEAR = "Linear"
_TRAINED_SCALES = "tensor_scales"


class CompressedTensors(Layout):
    """Integers, 8-bit floats, NVFP4 and microscaling; layers of several grids in one checkpoint included."""

    method = "compressed-tensors"
    title = "compressed-tensors"
    holds_transposed = False
    cache = StaticCache()
    package = "compressed-tensors"
    engines = "vLLM and SGLang"

    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        yield from common_misfits(grid)
        weight = grid.weights["weight"]
        store = _store(weight, grid.input is not None)
        yield from store.misfits(weight)
        if grid.input is not None:
            yield from input_misfits(grid.input, store.inputs, weight.dtype)

    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        groups: dict[str, Config] = {}
        for name, layer in layers.items():
            scheme = _scheme(layer)
            group = groups.setdefault(json.dumps(scheme), {"targets": []} | scheme)
            group["targets"].append(name)
        if len(groups) == 1:
            next(iter(groups.values()))["targets"] = [_LINEAR]
        formats = {group["format"] for group in groups.values()}
        trained = _trained_scales(layers)
        config = {
            "quant_method": self.method,
            "format": formats.pop() if len(formats) == 1 else _MIXED,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
            "ignore": list(others),
            "kv_cache_scheme": None,
        }
        return config | ({_TRAINED_SCALES: trained} if trained else {})

    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        yield from _store_of(layer).tensors(layer.weight.quantized())
        if isinstance(layer.input_quantizer, StoredActivation):
            yield from input_tensors(layer.input_quantizer, layer.weight.dtype)

    def is_quantized(self, names: set[str]) -> bool:
        return not names.isdisjoint(("weight_packed", "weight_scale"))

    def loading(self, config: Config, dtype: torch.dtype) -> dict[str, Any]:
        from transformers import CompressedTensorsConfig

        groups = config["config_groups"].values()
        if not any(_only_dequantized(group, dtype) for group in groups):
            return {}
        if len(groups) > 1 or config["kv_cache_scheme"]:
            # Dequantizing takes the first group for all layers, and quantizes no cache.
            raise NotInstalled(
                "transformers reads packed zero points, and microscaling in float32, only where all layers are alike: "
                f"{self.engines} read the others"
            )
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        _refuse_what_is_no_grid(config)
        scheme = _scheme_of(config, name)
        format = scheme.get("format") or config.get("format")
        if format not in _STORES:
            raise InputError(f"{name} is stored as '{format}'. Formats that are read: {', '.join(_STORES)}.")
        if not scheme.get("weights") or scheme.get("output_activations"):
            raise InputError(f"{name} is said to have weights in full precision, or quantized outputs: refused.")
        leaves = Leaves({**tensors, **_trained_scale(config, name)}, name)
        weight = _STORES[format].restore(leaves, Arguments.read(scheme["weights"], name), dtype)
        said = scheme.get("input_activations")
        input = None if said is None else restored_input(leaves, Arguments.read(said, name), dtype)
        leaves.finish()
        return StoredLinear(weight, input)


def _only_dequantized(group: Config, dtype: torch.dtype) -> bool:
    """Whether transformers 5.23 with compressed-tensors 0.20.1 reads a group by `dequantize=True` only.

    On the meta device the library makes room for zero points that are not packed; and it multiplies microscaling in
    bfloat16.
    """
    if group["format"] == PackQuantized.format:
        return not group["weights"]["symmetric"]
    return dtype == torch.float32 and group["format"] in {store.format for store in _MICROSCALING.values()}


def _store(weight: WeightGrid, quantized_input: bool) -> Store:
    """The format for a weight."""
    if isinstance(weight.format, FloatFormat):
        if weight.scale == torch.float8_e8m0fnu:
            return _MICROSCALING[weight.format.bits]
        if weight.format.bits == nvfp4.GRID.bits:
            return _STORES[NvFp4.format]
        return _STORES[FloatQuantized.format]
    return _STORES[IntQuantized.format if quantized_input else PackQuantized.format]


def _store_of(layer: PackedLinear) -> Store:
    return _store(WeightGrid.of(layer.weight.without_codes()), isinstance(layer.input_quantizer, StoredActivation))


def _scheme(layer: PackedLinear) -> Config:
    """What the config says of a layer, but for its name."""
    store, weight, input = _store_of(layer), WeightGrid.of(layer.weight.without_codes()), layer.input_quantizer
    said = input_arguments(input).written() if isinstance(input, StoredActivation) else None
    return {
        "weights": store.arguments(weight).written(),
        "input_activations": said,
        "output_activations": None,
        "format": store.format,
    }


def _trained_scales(layers: Mapping[str, PackedLinear]) -> dict[str, float]:
    """Scales of NVFP4 tensors that do not follow from those that are stored.

    Raises:
        InputError: if one has no inverse.
    """
    kept: dict[str, float] = {}
    for name, layer in layers.items():
        if isinstance(_store_of(layer), NvFp4):
            trained = nvfp4.not_recovered(layer.weight.quantized(), name)
            kept |= {} if trained is None else {name: trained}
    return kept


def _trained_scale(config: Config, name: str) -> dict[str, Tensor]:
    """What `_trained_scales` kept of a layer, as if it were one of its tensors."""
    kept = config.get(_TRAINED_SCALES) or {}
    if not isinstance(kept, dict) or not isinstance(kept.get(name, 0.0), float):
        raise InputError(f"config.json is damaged: its {_TRAINED_SCALES} are no numbers by the names of layers.")
    return {nvfp4.TRAINED_SCALE: torch.tensor([[kept[name]]])} if name in kept else {}


def _scheme_of(config: Config, name: str) -> dict[str, Any]:
    """The group of the linear layer `name`: of its own name first, then of a pattern, then of its class.

    Raises:
        InputError: if no group targets it, or it is to be ignored.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise InputError("config.json has no config_groups that say weights and targets of each group.")
    targets = {target: group for group in groups.values() for target in group.get("targets") or ()}
    if any(_matches(name, target) for target in config.get("ignore") or ()):
        raise InputError(f"{name} is quantized, and config.json says that it is not (ignore).")
    for target in sorted(targets, key=lambda target: (target == _LINEAR, target.startswith("re:"), target)):
        if _matches(name, target):
            found: dict[str, Any] = targets[target]
            return found
    raise InputError(f"{name} is quantized, and config.json has no group for it.")


def _matches(name: str, target: str) -> bool:
    """Whether `target` means the linear layer `name`."""
    if not target.startswith("re:"):
        return target in (name, _LINEAR)
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except re.error as error:
        raise InputError(f"config.json names layers by '{target}', which is no pattern: {error}.") from error


def _refuse_what_is_no_grid(config: Config) -> None:
    """Refuse what changes a model beyond the grids of its layers."""
    for key in ("transform_config", "sparsity_config"):
        said = config.get(key)
        if said and not (key == "sparsity_config" and said.get("format", "dense") == "dense"):
            raise InputError(f"The checkpoint has a {key}, which is not read: {said}.")
    if config.get("quantization_status") not in ("compressed", None):
        raise InputError("The checkpoint's weights are not compressed: its quantization_status is not 'compressed'.")
