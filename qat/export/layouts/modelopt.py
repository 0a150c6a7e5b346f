"""The layout of checkpoints of NVIDIA's Model Optimizer, which TensorRT-LLM, vLLM and SGLang read.

`hf_quant_config.json` beside `config.json` says the algorithm and the layers that are left out; older engines read the
one, newer ones the other. The tensors of a layer follow from the algorithm (`modelopt_algorithms.py`).

Not held: NVFP4 and W4A8_NVFP4_FP8, since no grid of inputs here has a static scale above dynamic ones of blocks;
W4A8_AWQ, which rounds int4 * scale to fp8 once more; W8A8_SQ_PER_CHANNEL, which no loader of these engines takes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import LayerGrid, layer_grids
from qat.export.layouts.base import Config, Layout, Misfit, StoredLinear, common_misfits, name_misfits
from qat.export.layouts.checks import option
from qat.export.layouts.modelopt_algorithms import ALGORITHMS, Algorithm, nearest_algorithm
from qat.nn import PackedLinear

# Engines recognise the layout by this name; the version is one whose layout this is.
_PRODUCER = {"name": "modelopt", "version": "0.43.0"}
# Layers that engines multiply as one matrix, by the ends of their names.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class ModelOpt(Layout):
    """Floats of 8 and 4 bits and integers, one algorithm for all layers.

    Args:
        separate_scales: store layers that engines fuse (queries, keys and values; gate and up) though each has a scale
            for its whole weight. vLLM takes the largest of those scales for all of them: it rounds weights of FP8
            anew, and multiplies weights of NVFP4 by the wrong scale; TensorRT-LLM refuses NVFP4. For engines that
            fuse nothing.
    """

    method = "modelopt"
    title = "ModelOpt"
    engines = "TensorRT-LLM and vLLM"
    holds_transposed = False  # vLLM transposes what is called `weight` in GPT-2, quantized or not

    def __init__(self, separate_scales: bool = False) -> None:
        self.separate_scales = separate_scales

    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        yield from common_misfits(grid)
        yield from _algorithm(grid).misfits(grid.weights["weight"], grid.input)

    def joint_misfits(self, grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
        kinds = {" in groups of ".join(map(str, _said(grid).values())) for grid in grids.values()}
        if len(kinds) > 1:
            yield Misfit(f"layers of several kinds: {', '.join(sorted(kinds))}", "~scheme.rules")
        yield from name_misfits(grids, others)
        for names in () if self.separate_scales else _fused(grids):
            algorithm = _algorithm(grids[names[0]])
            if algorithm.tensor_scale:
                yield Misfit(
                    f"a scale of its own for each of {', '.join(names)}, which engines fuse",
                    "quantizer@scheme.weight=fp8 scheme.weight.bits=8 scheme.weight.granularity=per_channel "
                    "quantizer@scheme.input=fp8_token, "
                    "or export.modelopt.layout.separate_scales=true for an engine that does not.",
                )
                return

    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        grids = {name: grid for name, layer in layers.items() for grid in layer_grids(layer).values()}
        first = next(iter(grids.values()))
        algorithm, said = _algorithm(first), _said(first)
        if algorithm.input is not None and algorithm.input.rule is None and not self.separate_scales:
            _check_shared_inputs(layers, grids)
        size = {"group_size": said["group_size"]} if "group_size" in said else {}
        group: dict[str, Any] = {"weights": _group(algorithm.bits, algorithm.type) | size, "targets": ["Linear"]}
        if algorithm.input is not None:
            group["input_activations"] = _group(algorithm.input.format.bits, "float", algorithm.input.rule is not None)
        return {
            "quant_method": self.method,
            **said,
            "ignore": list(others),
            "config_groups": {"group_0": group},
            "producer": _PRODUCER,
        }

    def files(self, config: Config) -> Mapping[str, str]:
        own = {key: config[key] for key in ("quant_algo", "group_size") if key in config}
        factors = {"has_zero_point": False, "pre_quant_scale": True} if config["quant_algo"] == "W4A16_AWQ" else {}
        quantization = own | factors | {"kv_cache_quant_algo": None, "exclude_modules": config["ignore"]}
        text = json.dumps({"producer": _PRODUCER, "quantization": quantization}, indent=4)
        return {"hf_quant_config.json": text + "\n"}

    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        return ALGORITHMS[config["quant_algo"]].tensors(layer)

    def is_quantized(self, names: set[str]) -> bool:
        return "weight_scale" in names

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        algorithm = ALGORITHMS[option(config, "quant_algo", list(ALGORITHMS))]
        option(config, "kv_cache_scheme", [None])
        size = option(config, "group_size", algorithm.group_sizes) if algorithm.group_sizes else 0
        return algorithm.restore(tensors, size, name, dtype)


def _algorithm(grid: LayerGrid) -> Algorithm:
    return nearest_algorithm(grid.weights["weight"])


def _said(grid: LayerGrid) -> dict[str, Any]:
    """What a checkpoint says once for all layers."""
    algorithm = _algorithm(grid)
    size = algorithm.group_size(grid.weights["weight"])
    return {"quant_algo": algorithm.name} | ({"group_size": size} if size else {})


def _group(bits: int, type: str, dynamic: bool = False) -> dict[str, Any]:
    return {"dynamic": dynamic, "num_bits": bits, "type": type}


def _fused(names: Mapping[str, Any]) -> Iterator[list[str]]:
    """The quantized layers that engines multiply as one, where these are several."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for family in _FUSED:
            siblings = [f"{parent}.{leaf}".lstrip(".") for leaf in family]
            found = [name for name in siblings if name in names]
            if len(found) > 1:
                yield found


def _check_shared_inputs(layers: Mapping[str, PackedLinear], grids: Mapping[str, LayerGrid]) -> None:
    """Refuse layers that engines fuse and whose inputs have several scales: engines take the largest."""
    for names in _fused(grids):
        scales = [layers[name].input_quantizer.get_buffer("scale") for name in names]
        if any(not torch.equal(scale, scales[0]) for scale in scales):
            raise InputError(
                f"{', '.join(names)} have scales of their inputs that differ, and engines fuse these layers: calibrate "
                "them on the same data, or set export.modelopt.layout.separate_scales=true for an engine that does not."
            )
