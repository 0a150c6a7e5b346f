"""Which layers of a model can be pruned, and how one gets its mask."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.nn import QuantCustomEmbedding, QuantEmbedding, QuantLayer, quant_class
from qat.quantizers import NoQuantizer, Quantizer
from qat.quantizers.mask import Masked
from qat.transforms.build import Shared, found_at, quant_layer
from qat.transforms.layers import conv1d_to_linear, kept_layers, output_head, plain_layers, quant_layers, replace
from qat.transforms.rules import Rule, Scheme

_MASK = "_quantizer.mask"


def prunable(model: nn.Module, exclude: str | Sequence[str] = (), head: bool = False) -> dict[str, QuantLayer]:
    """The layers of `model` whose weights can be pruned, by name; plain ones become layers that can hold a mask.

    Those are linear layers, convolutions and experts, whether their weights are quantized or not. Embeddings, routers
    and, unless `head` is set, the output head stay dense.

    Args:
        model: prepared or not.
        exclude: names of layers that stay dense, with shell wildcards.
        head: prune the output head too, and with it an embedding that shares its weight.

    Raises:
        InputError: if a pattern of `exclude` matches no layer, or nothing is left.
    """
    conv1d_to_linear(model)
    plain = plain_layers(model)
    if "" in plain:
        raise InputError(f"A lone {type(model).__name__} cannot be replaced: wrap it, torch.nn.Sequential(layer).")
    kept = kept_layers(model, plain, Scheme(head=head))
    embeddings = {name for name, layer in plain.items() if isinstance(layer, nn.Embedding)}
    names = [name for name in plain if name not in kept and name not in embeddings]
    output = None if head else output_head(model)
    names += [name for name, layer in quant_layers(model) if layer is not output and not _is_embedding(layer)]
    left = _without(names, (exclude,) if isinstance(exclude, str) else exclude)
    if not left:
        raise InputError("There is no layer to prune: exclude fewer of them.")
    hold_masks(model, [name for name in left if name in plain])
    return {name: layer for name, layer in quant_layers(model) if name in left}


def hold_masks(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the plain layers `names` by ones in full precision that can hold masks."""
    shared: Shared = {}
    for name in names:
        layer = model.get_submodule(name)
        kind = quant_class(layer)
        assert kind is not None
        replace(model, name, quant_layer(name, layer, kind, Rule(), shared, initialize=False))


def hold_masks_of(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Let the plain layers of `model` hold masks that have one in `state`, a state dict to be loaded."""
    owners = {name.removesuffix(_MASK).rpartition(".")[0] for name in state if name.endswith(_MASK)}
    hold_masks(model, [name for name in plain_layers(model) if name in owners])


@torch.no_grad()
def set_mask(name: str, layer: QuantLayer, weight_name: str, mask: Tensor) -> None:
    """Prune one weight of the layer called `name` by `mask`, shaped like its matrix: now, and whenever it is used.

    Raises:
        InputError: if its grid has no zero.
    """
    quantizer: Masked = getattr(layer, f"{weight_name}_quantizer")
    with found_at(name):
        quantizer.set_mask(mask)
    layer.write(weight_name, quantizer.masked(layer.matrix(layer, weight_name).detach()))


@torch.no_grad()
def refit(layer: QuantLayer) -> None:
    """Fit the weight quantizers of `layer` to its weights as they are now."""
    for weight in layer.weights():
        if isinstance(weight.quantizer, Quantizer):
            weight.quantizer.initialize(weight.matrix)


def require_zeros(layers: Mapping[str, QuantLayer]) -> None:
    """Refuse, before anything is pruned, grids without a zero."""
    for name, layer in layers.items():
        with found_at(name):
            for weight in layer.weights():
                weight.quantizer.require_zero()


def masks(model: nn.Module) -> Iterator[Tensor]:
    """The mask of every pruned weight; of shared ones once."""
    seen: set[int] = set()
    for _, layer in quant_layers(model):
        for weight in layer.weights():
            mask = weight.quantizer.mask
            if mask is not None and id(weight.quantizer) not in seen:
                seen.add(id(weight.quantizer))
                yield mask


def sparsity(model: nn.Module) -> float:
    """The share of the weights that masks prune, of all weights that have one; 0 without any."""
    found = [(int((~mask).sum()), mask.numel()) for mask in masks(model)]
    return sum(pruned for pruned, _ in found) / max(1, sum(count for _, count in found))


@torch.no_grad()
def write_zeros(layer: QuantLayer) -> None:
    """Let the Parameters of `layer` be zero where masks prune them; an optimizer with momentum may have moved them."""
    for weight in layer.weights():
        if weight.quantizer.mask is not None:
            layer.write(weight.name, torch.where(weight.quantizer.mask, weight.matrix, 0))


def is_plain_weight(layer: QuantLayer) -> bool:
    """Whether all weights of `layer` are in full precision."""
    return all(isinstance(weight.quantizer, NoQuantizer) for weight in layer.weights())


def _is_embedding(layer: QuantLayer) -> bool:
    return isinstance(layer, QuantEmbedding | QuantCustomEmbedding)


def _without(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"exclude '{pattern}' matches no layer that is pruned.{nearest(pattern, names)}")
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
