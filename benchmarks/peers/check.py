"""Whether what a tool left is what was asked for: the same layers on a grid of the same size, and read as it meant."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.job import linear_layers

# A tool may run its model in 16 bits, and so see another loss.
_LOSS_TOLERANCE = 0.03


def check_weights(arm: str, weights: Mapping[str, Tensor], model: Any, bits: int, group_size: int) -> None:
    """Refuse weights that would make a comparison unfair.

    Args:
        weights: what a tool changed, by the names of the parameters of `model`.
        group_size: columns that share a scale or a codebook; 0 for whole rows.

    Raises:
        SystemExit: if a linear layer but the head is missing, anything else was changed but a vector (a scale that went
            into a norm), a tensor has another shape or is not finite, or a group has more than 2^bits values.
    """
    quantized = {f"{name}.weight" for name in linear_layers(model)}
    known = dict(model.named_parameters())
    if missing := sorted(quantized - set(weights)):
        raise SystemExit(f"{arm} is not fair: {len(missing)} layers are not quantized: {missing[0]} ...")
    for name, tensor in weights.items():
        if name not in known or known[name].shape != tensor.shape:
            raise SystemExit(f"{arm} left {name} {tuple(tensor.shape)}, and the model has no such tensor.")
        if name not in quantized and tensor.ndim > 1:
            raise SystemExit(f"{arm} is not fair: it changed {name}, which stays as it is.")
        if not torch.isfinite(tensor).all():
            raise SystemExit(f"{arm} left NaN or infinity in {name}.")
        if name in quantized and (found := most_values(tensor, group_size)) > 2**bits:
            raise SystemExit(f"{arm} is not fair: a group of {name} has {found} values, {2**bits} is the most.")


def most_values(weight: Tensor, group_size: int) -> int:
    """The most distinct values in any group of `group_size` columns of a row; 0 is the whole row."""
    groups = weight.reshape(-1, group_size or weight.shape[1]).sort(dim=1).values
    return int((groups.diff(dim=1) != 0).sum(1).max()) + 1


def check_loss(arm: str, own: float, found: float) -> None:
    """Refuse weights with which the model has another loss than the tool itself has: they are not what it made.

    Raises:
        SystemExit: if the losses differ by more than 3 %.
    """
    if not abs(found - own) <= _LOSS_TOLERANCE * own:
        raise SystemExit(f"{arm} has a loss of {own:.3f} by itself and {found:.3f} here: its weights are misread.")
