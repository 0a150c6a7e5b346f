"""Checkpoints of transformers whose linear layers are quantized: what serving engines read.

The folder holds `config.json` with a `quantization_config`, safetensors, the generation settings and the tokenizer. How
the tensors of a quantized layer look is the business of a `Layout`.
"""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.atomic import recover, replaced_folder
from qat.errors import InputError
from qat.export.architecture import empty_model, fill, transposed_layers
from qat.export.consumers import Consumer, NotInstalled, transformers_consumer
from qat.export.grids import layer_grids
from qat.export.layouts.base import Config, Layout, Misfit
from qat.export.targets import Target, refuse
from qat.export.tensor_files import SHARD_BYTES, Named, TensorFiles, write_tensors
from qat.nn import PackedLinear, PackedTensor
from qat.nn.kv_quantizer import kv_layers
from qat.transforms.layers import conv1d_to_linear, replace


class Checkpoint(Target):
    """A checkpoint of transformers in the layout of an engine.

    Args:
        layout: of the quantized linear layers.
        shard_bytes: the largest file of tensors.
    """

    def __init__(self, layout: Layout, shard_bytes: int = SHARD_BYTES) -> None:
        self.layout = layout
        self.shard_bytes = shard_bytes
        self.title = layout.title

    def check(self, model: nn.Module) -> None:
        grids = layer_grids(model)
        if any(True for _ in kv_layers(model)):
            raise InputError(f"{self.title} has no place for a quantized KV cache: set kv@scheme.kv=none.")
        if not grids:
            raise InputError(f"{self.title} stores quantized layers, and the scheme has none: choose scheme=w4.")
        transposed = set() if self.layout.holds_transposed else transposed_layers(model)
        for name, grid in grids.items():
            refuse(self.title, name, self.layout.misfits(grid))
            if name in transposed:
                refuse(self.title, name, [Misfit("weights that its model stores transposed", "export=native")])

    def write(self, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
        self.check(model)
        recover(Path(folder))
        if Path(folder).is_dir() and any(Path(folder).iterdir()) and not (Path(folder) / "config.json").is_file():
            raise InputError(
                f"{folder} holds other files, which saving would replace: choose a new or an empty folder."
            )
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        others = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        quantization = self.layout.config(layers, others)
        with replaced_folder(folder) as temporary:
            config: Any = copy.deepcopy(model.config)
            config.quantization_config = quantization
            config.dtype = _dtype(model)
            parts: list[Any] = [config, getattr(model, "generation_config", None), tokenizer]
            for part in parts:
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(temporary)
            write_tensors(temporary, partial(self._tensors, model, quantization), self.shard_bytes)
        return Path(folder)

    def _tensors(self, model: nn.Module, config: Config) -> Named:
        """All tensors under the names that transformers gives them; one that several modules share, once."""
        seen: set[int] = set()
        transposed = transposed_layers(model)
        for name, module in _plain_and_packed(model):
            if not isinstance(module, PackedLinear):
                yield from _own_tensors(name, module, name in transposed, seen)
                continue
            for leaf, tensor in self.layout.tensors(module, config):
                yield f"{name}.{leaf}", tensor
            if module.bias is not None:
                yield f"{name}.bias", module.bias

    def read(self, folder: str | Path, trust_remote_code: bool = False) -> nn.Module:
        folder = Path(folder)
        recover(folder)
        files = TensorFiles(folder)
        model, config = empty_model(folder, trust_remote_code)
        method = (config or {}).get("quant_method")
        if method != self.layout.method:
            raise InputError(
                f"{folder} is no {self.title} checkpoint: the quant_method of its config.json is {method}."
            )
        transposed = transposed_layers(model)
        conv1d_to_linear(model)
        for name, leaves in _leaves(files).items():
            if self.layout.is_quantized(leaves):
                self._restore(model, name, {leaf: files[f"{name}.{leaf}"] for leaf in leaves}, config)
        fill(model, files, transposed)
        return model.eval()

    def consumer(self, folder: Path) -> Consumer:
        if self.layout.package is None:
            raise NotInstalled(f"{self.layout.engines} need environments of their own: make test-engines")
        return transformers_consumer(folder, self.layout.package)

    def _restore(self, model: nn.Module, name: str, tensors: dict[str, Tensor], config: Config) -> None:
        """Put the packed layer `name` in the place of the linear one."""
        linear = model.get_submodule(name) if name in dict(model.named_modules()) else None
        if not isinstance(linear, nn.Linear):
            raise InputError(f"The checkpoint does not fit its config.json, whose model has no linear layer {name}.")
        weight, input = self.layout.restore(tensors, config, name, linear.weight.dtype)
        if tuple(weight.shape) != tuple(linear.weight.shape):
            raise InputError(f"{name} is {list(weight.shape)}, and its config.json says {list(linear.weight.shape)}.")
        packed = PackedLinear(
            linear, {"weight": PackedTensor.from_quantized(weight)}, input or nn.Identity(), nn.Identity()
        )
        replace(model, name, packed)


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in."""
    packed = (module.weight.dtype for module in model.modules() if isinstance(module, PackedLinear))
    return next(packed)


def _leaves(files: TensorFiles) -> dict[str, set[str]]:
    """The names of the tensors of every module, without its own."""
    found: dict[str, set[str]] = {}
    for name in files:
        owner, _, leaf = name.rpartition(".")
        found.setdefault(owner, set()).add(leaf)
    return found


def _plain_and_packed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but those within a packed layer."""
    packed = [f"{name}." for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    for name, module in model.named_modules():
        if not name.startswith(tuple(packed)):
            yield name, module


def _own_tensors(name: str, module: nn.Module, transposed: bool, seen: set[int]) -> Named:
    """What `module` itself has in a state dict; not what was seen before, by its address."""
    absent = module._non_persistent_buffers_set
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or leaf in absent or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        own = tensor.detach()
        yield f"{name}.{leaf}", own.t() if transposed and leaf == "weight" else own
