"""A GGUF file back as a converted model."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.export.architecture import empty_from, empty_model
from qat.export.gguf.architectures import Architecture, Names, architecture_named, architecture_of
from qat.export.gguf.blocks import BLOCK_TYPES
from qat.export.gguf.file import Entry, GgufFile
from qat.export.gguf.rope import FACTORS, rope_factors
from qat.export.gguf.writing import FLOAT_TYPES
from qat.nn import PACKED_LAYERS, PackedTensor
from qat.transforms.layers import conv1d_to_linear, replace

_DTYPES = {name: dtype for dtype, name in FLOAT_TYPES.items()}
_LAYERS = {nn.Linear: "linear", nn.Embedding: "embedding"}
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def read_model(path: Path, trust_remote_code: bool) -> nn.Module:
    """The model of a file, in the architecture of the `config.json` beside it, or else of its own metadata.

    Raises:
        InputError: if the file is damaged, holds what is not read, or does not fit the architecture.
    """
    file = GgufFile(path)
    architecture = architecture_named(file)
    for name, entry in file.entries.items():
        _check_type(file, name, entry)
    if (path.parent / "config.json").is_file():
        model, _ = empty_model(path.parent, trust_remote_code)
        _compare(file, architecture, model.config)
    else:
        config = architecture.config(file)
        architecture.check(config)
        config.dtype = _dtype(file)
        model = empty_from(config)
    conv1d_to_linear(model)
    _Reading(file, model, architecture).fill()
    return model.eval()


def _check_type(file: GgufFile, name: str, entry: Entry) -> None:
    if entry.type in BLOCK_TYPES or entry.type in _DTYPES:
        return
    why = "scales are quantized in superblocks" if entry.type.endswith("_K") else "grid is none of those here"
    raise InputError(
        f"{file.path}: {name} is {entry.type}, whose {why}. Quantize the model again to one of "
        f"{', '.join((*BLOCK_TYPES, *_DTYPES))}."
    )


def _dtype(file: GgufFile) -> torch.dtype:
    """What the values were in, as far as a file says it: its matrices that are not quantized."""
    kinds = {entry.type for entry in file.entries.values() if len(entry.shape) > 1}
    return next((dtype for kind, dtype in _HALVES.items() if kind in kinds), torch.float32)


def _compare(file: GgufFile, architecture: Architecture, config: Any) -> None:
    """Refuse a `config.json` that says something else than the metadata: with other heads, rows would be mixed up."""
    if architecture_of(config) is not architecture:
        raise InputError(f"{file.path} is a {architecture.name}, and its config.json says {config.model_type}.")
    architecture.check(config)
    for key, value in architecture.metadata(config).items():
        said: Any = file.metadata.get(f"{architecture.name}.{key}", value)
        both = isinstance(value, float) and isinstance(said, float)
        same = math.isclose(said, value, rel_tol=1e-6) if both else said == value  # a file has 32 bits
        if not same and key != "context_length":
            raise InputError(f"{file.path} says that its {key} is {said}, and its config.json says {value}.")


class _Reading:
    """Fills a model that is on the meta device with what a file holds."""

    def __init__(self, file: GgufFile, model: nn.Module, architecture: Architecture) -> None:
        self.file = file
        self.model: Any = model
        self.config: Any = model.config
        self.names = Names(architecture, self.config)
        self.left = set(file.entries)
        # Modules that share a tensor get the same one.
        self.made: dict[str, nn.Parameter | PackedTensor] = {}

    def fill(self) -> None:
        """Fill everything.

        Raises:
            InputError: if tensors are missing or left over, or have other shapes.
        """
        for path, module in list(self.model.named_modules()):
            # Biases first: a packed layer takes over that of the layer which it replaces.
            for leaf in sorted(module._parameters, key="weight".__eq__):
                parameter = module._parameters[leaf]
                if parameter is not None:
                    self._fill(path, module, leaf, parameter)
        self._check_rope()
        if self.left:
            raise InputError(
                f"{self.file.path} holds {len(self.left)} tensors that its model has no place for, "
                f"{min(self.left)} among them."
            )

    def _fill(self, path: str, module: nn.Module, leaf: str, parameter: Tensor) -> None:
        name = self.names.of(path, leaf)
        if name == "output.weight" and self.config.tie_word_embeddings:
            name = "token_embd.weight"
        self.left.discard(name)
        if name not in self.made:
            self.made[name] = self._make(name, self.names.order(path, parameter.shape[0]), parameter)
        made = self.made[name]
        if isinstance(made, nn.Parameter):
            setattr(module, leaf, made)
            return
        kind = _LAYERS.get(type(module))
        if kind is None:
            raise InputError(f"{self.file.path}: {name} is quantized, and no layer here takes that.")
        replace(self.model, path, PACKED_LAYERS[kind](module, {"weight": made}, nn.Identity(), nn.Identity()))

    def _make(self, name: str, order: Tensor | None, parameter: Tensor) -> nn.Parameter | PackedTensor:
        entry = self.file.entries.get(name)
        if entry is None:
            raise InputError(f"{self.file.path} has no tensor {name}: it does not hold what its config says.")
        if entry.shape != tuple(parameter.shape):
            raise InputError(
                f"{self.file.path}: {name} is {list(entry.shape)}, and its config says {list(parameter.shape)}."
            )
        back = slice(None) if order is None else order.argsort()
        rows = self.file.data(name).view(entry.shape[0], -1)[back]
        if entry.type in BLOCK_TYPES:
            quantized = BLOCK_TYPES[entry.type].from_bytes(rows, f"{self.file.path}: {name}", parameter.dtype)
            return PackedTensor.from_quantized(quantized)
        numbers = rows.contiguous().view(_DTYPES[entry.type]).view(entry.shape)
        return nn.Parameter(numbers.to(parameter.dtype), parameter.requires_grad)

    def _check_rope(self) -> None:
        """The factors of the rotation are computed from the configuration; those of the file must be the same."""
        self.left.discard(FACTORS)
        factors = rope_factors(self.config)
        found = self.file.data(FACTORS).view(torch.float32) if FACTORS in self.file.entries else None
        if (factors is None) != (found is None) or (
            factors is not None and found is not None and not torch.allclose(factors, found, rtol=1e-4)
        ):
            raise InputError(f"{self.file.path} scales its rotary positions otherwise than its config.json says.")
