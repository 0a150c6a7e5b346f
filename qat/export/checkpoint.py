"""Checkpoints of transformers whose linear layers are quantized: what serving engines read.

The folder holds `config.json` with a `quantization_config`, safetensors, the generation settings and the tokenizer. How
the tensors of a quantized layer look is the business of a `Layout`.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat.atomic import recover
from qat.errors import InputError
from qat.export.architecture import empty_model, fill, transposed_layers
from qat.export.consumers import Consumer, NotInstalled, transformers_consumer, versions
from qat.export.layouts.base import Config, Layout, Misfit
from qat.export.model_folder import computing_dtype, model_folder
from qat.export.targets import Target, refuse, refuse_cache, stored_grids
from qat.export.tensor_files import SHARD_BYTES, Named, TensorFiles, write_tensors
from qat.nn import PackedLinear, PackedTensor, StoredActivation
from qat.nn.kv_quantizer import KVQuantizer, kv_layers
from qat.nn.packed import dtype_named
from qat.transforms.kv import restore_kv
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
        self.exact_engine = layout.exact_engine

    def check(self, model: nn.Module) -> None:
        grids = stored_grids(self.title, model)
        cache = self.layout.cache
        if cache is None:
            refuse_cache(self.title, model)
        else:
            (weight, *_) = next(iter(grids.values())).weights.values()
            for name, kv in _caches(model).items():
                refuse(self.title, f"the KV cache of {name}", cache.misfits(kv, weight.dtype))
        transposed = set() if self.layout.holds_transposed else transposed_layers(model)
        for name, grid in grids.items():
            refuse(self.title, name, self.layout.misfits(grid))
            if name in transposed:
                refuse(self.title, name, [Misfit("weights that its model stores transposed", "export=native")])
        refuse(self.title, "this model", self.layout.joint_misfits(grids, _plain(model)))

    def write(self, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
        self.check(model)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        quantization = self.layout.config(layers, _plain(model))
        if self.layout.cache is not None and (caches := _caches(model)):
            quantization |= self.layout.cache.config(caches)
        settings = {"quantization_config": quantization, "dtype": computing_dtype(model)}
        with model_folder(folder, "config.json", model, tokenizer, **settings) as temporary:
            tensors = partial(self._tensors, model, quantization, transposed_layers(model))
            write_tensors(temporary, tensors, self.shard_bytes)
            for name, text in self.layout.files(quantization).items():
                (temporary / name).write_text(text)
        return Path(folder)

    def _tensors(self, model: nn.Module, config: Config, transposed: set[str]) -> Named:
        """All tensors under the names that transformers gives them; one that several modules share, once."""
        seen: set[int] = set()
        for name, module in _plain_and_packed(model):
            if isinstance(module, KVQuantizer) and self.layout.cache is not None:
                for leaf, tensor in self.layout.cache.tensors(module, computing_dtype(model)):
                    yield f"{name.rpartition('.')[0]}.{leaf}", tensor
                continue
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
        if not self.layout.wrote(config):
            method = config.get("quant_method")
            raise InputError(
                f"{folder} is no {self.title} checkpoint: the quant_method of its config.json is {method}. Open it by "
                "qat.load, which finds out what it is."
            )
        transposed = transposed_layers(model)
        conv1d_to_linear(model)
        modules, stored = dict(model.named_modules()), self._leaves(files)
        for name, leaves in stored.items():
            if self.layout.is_quantized(leaves):
                tensors = {leaf: files[f"{name}.{leaf}"] for leaf in leaves}
                replace(model, name, self._restored(modules.get(name), name, tensors, config))
        self._restore_caches(model, files, stored, config)
        fill(model, files, transposed)
        return model.eval()

    def _restore_caches(
        self, model: nn.Module, files: TensorFiles, stored: Mapping[str, set[str]], config: Config
    ) -> None:
        """Put the stored grids of keys and values into the attention layers."""
        cache = self.layout.cache
        if cache is None:
            return
        stored = {name: leaves for name, leaves in stored.items() if cache.is_quantized(leaves)}
        if bool(stored) != cache.is_said(config):
            raise InputError(f"{files.folder}: tensors and config.json do not agree on whether its cache is quantized.")
        found, dtype = {}, computing_dtype(model)
        for name, leaves in stored.items():
            found[name] = cache.restore({leaf: files[f"{name}.{leaf}"] for leaf in leaves}, config, name, dtype)
        described = {name: _roles(kv) for name, kv in found.items()}
        restore_kv(model, {"window": 0, "layers": described} if described else None)
        for name, kv in found.items():
            _caches(model)[name].load_state_dict(kv.state_dict())

    def consumer(self, folder: Path) -> Consumer:
        if self.layout.package is None:
            raise NotInstalled(f"{self.layout.engines} need environments of their own: make test-engines")
        versions(self.layout.package)
        whole = json.loads((folder / "config.json").read_text())
        options = self.layout.loading(whole["quantization_config"], dtype_named(whole["dtype"]))
        return transformers_consumer(folder, self.layout.package, **options)

    def _leaves(self, files: TensorFiles) -> dict[str, set[str]]:
        """The names of the tensors of every module, without its own."""
        found: dict[str, set[str]] = {}
        for name in files:
            owner, leaf = self.layout.split(name)
            found.setdefault(owner, set()).add(leaf)
        return found

    def _restored(
        self, linear: nn.Module | None, name: str, tensors: dict[str, Tensor], config: Config
    ) -> PackedLinear:
        """The packed layer `name`, for the place of the linear one."""
        if not isinstance(linear, nn.Linear):
            raise InputError(f"The checkpoint does not fit its config.json, whose model has no linear layer {name}.")
        weight, input = self.layout.restore(tensors, config, name, linear.weight.dtype)
        if tuple(weight.shape) != tuple(linear.weight.shape):
            raise InputError(f"{name} is {list(weight.shape)}, and its config.json says {list(linear.weight.shape)}.")
        packed = {"weight": PackedTensor.from_quantized(weight)}
        return PackedLinear(linear, packed, input or nn.Identity(), nn.Identity())


def _plain(model: nn.Module) -> list[str]:
    """The linear layers in full precision."""
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def _caches(model: nn.Module) -> dict[str, KVQuantizer]:
    """The quantizers of keys and values of each attention layer, by its name."""
    return {name: kv for name, _, kv in kv_layers(model)}


def _roles(kv: KVQuantizer) -> dict[str, Any]:
    """What `restore_kv` installs `kv` from."""
    roles = {"key": kv.key_quantizer, "value": kv.value_quantizer}
    return {role: x.description for role, x in roles.items() if isinstance(x, StoredActivation)}


def _plain_and_packed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module but those within a packed layer, or within the quantizers of a cache."""
    packed = [f"{name}." for name, module in model.named_modules() if isinstance(module, PackedLinear | KVQuantizer)]
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
