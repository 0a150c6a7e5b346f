"""The parts of a transformer that can be taken out of it: key/value groups of its attention, channels of its MLP."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn.experts import is_experts

# What layers are called, by their task; the first that a module has is taken.
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION_OUT = ("o_proj", "out_proj", "dense")
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))


@dataclass(frozen=True)
class Part:
    """Layers that hold units side by side: the rows of some layers, and the columns of the one that reads them.

    Attributes:
        name: of the module, in its block.
        rows: layers, each with how many of its rows belong to a unit.
        out: the layer whose input they make.
        width: columns of `out` that belong to a unit.
    """

    name: str
    rows: tuple[tuple[nn.Linear, int], ...]
    out: nn.Linear
    width: int

    @property
    def units(self) -> int:
        return self.out.in_features // self.width

    def columns(self, units: Tensor) -> Tensor:
        """Those of `out` that belong to `units`."""
        return _members(units, self.width)

    @torch.no_grad()
    def keep(self, units: Tensor, weight: Tensor | None = None) -> None:
        """Take all but `units`, ascending, out of the layers; `weight` is what `out` shall hold then."""
        for layer, width in self.rows:
            own = _members(units, width)
            layer.weight = _like(layer.weight, layer.weight[own])
            layer.bias = None if layer.bias is None else _like(layer.bias, layer.bias[own])
            layer.out_features = len(own)
        columns = self.columns(units)
        self.out.weight = _like(self.out.weight, self.out.weight[:, columns] if weight is None else weight)
        self.out.in_features = len(columns)


def attention_of(block: nn.Module) -> Part:
    """The attention of `block`; a unit is a key/value head with all the query heads that share it.

    Raises:
        InputError: if it has none that is known.
    """
    for name, module in block.named_modules():
        into, ends = _linear(module, _QKV), _linear(module, _ATTENTION_OUT)
        if len(into) == len(_QKV) and ends and hasattr(module, "head_dim"):
            queries, keys, values = into
            size: Any = module.head_dim
            width = size * (queries.out_features // keys.out_features)
            return Part(name, ((queries, width), (keys, size), (values, size)), ends[0], width)
    raise InputError(_unknown(block, "attention", f"{', '.join(_QKV)} and {_ATTENTION_OUT[0]}", "heads"))


def mlp_of(block: nn.Module) -> Part:
    """The MLP of `block`; a unit is one of its channels.

    Raises:
        InputError: if it has none that is known, or experts in its place.
    """
    if any(is_experts(module) or name.endswith("experts") for name, module in block.named_modules()):
        raise InputError(
            f"{type(block).__name__} has experts, whose channels cannot be removed: set channels=0, or prune them by "
            "transforms=prune_magnitude."
        )
    for name, module in block.named_modules():
        for names in _MLPS:
            layers = _linear(module, names)
            if len(layers) == len(names):
                return Part(name, tuple((layer, 1) for layer in layers[:-1]), layers[-1], 1)
    raise InputError(_unknown(block, "MLP", "gate_proj, up_proj and down_proj", "channels"))


def _linear(module: nn.Module, names: Iterable[str]) -> list[nn.Linear]:
    """Those of `names` that are plain linear layers of `module`."""
    found = (getattr(module, name, None) for name in names)
    return [layer for layer in found if type(layer) is nn.Linear]


def _unknown(block: nn.Module, what: str, layers: str, option: str) -> str:
    return f"{type(block).__name__} has no {what} of separate linear layers ({layers}): set {option}=0."


def _members(units: Tensor, width: int) -> Tensor:
    """Indices of the `width` consecutive members of each of `units`."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _like(parameter: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(parameter.dtype).clone(), parameter.requires_grad)
