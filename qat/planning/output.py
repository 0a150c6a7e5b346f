"""Costs from what each layer computes: the error of its output on the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.planning.candidates import PlannedLayer
from qat.planning.fisher import Cost
from qat.planning.predictions import Batch, predictions
from qat.planning.rows import tracked

# Bytes of X^T X that are gathered in one pass over the data.
_MEMORY = 4 * 2**30
Grams = dict[str, Tensor]


def output(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Cost:
    """|X E^T|^2 / |X W^T|^2: the share of a layer's output that is error, E being the errors of its weights W.

    Both are found through X^T X, the Hessian that GPTQ uses (arXiv 2210.17323). A share, because outputs of different
    layers are of different sizes; what a layer's output means for the loss is not in it.

    Raises:
        InputError: if a layer is not linear.
    """
    for layer in layers:
        if not isinstance(layer.module, nn.Linear):
            raise InputError(f"signal=output is for linear layers, and {layer.name} is none: take signal=fisher or kl.")
    grams: Grams = {}
    for together in _portions(layers):
        grams |= _grams(model, together, batches)
    return partial(_cost, grams)


def _cost(grams: Grams, layer: PlannedLayer, errors: Mapping[str, Tensor]) -> float:
    (weight,) = layer.matrices().values()
    gram = grams[layer.name].to(weight.device)
    energy = _energy(weight.float(), gram)
    return _energy(errors["weight"], gram) / energy if energy > 0 else 0.0


def _energy(rows: Tensor, gram: Tensor) -> float:
    """|X R^T|^2 = tr(R X^T X R^T)."""
    return float(((rows @ gram) * rows).sum())


def _portions(layers: Sequence[PlannedLayer]) -> Iterator[list[PlannedLayer]]:
    """Layers whose X^T X fit the memory together."""
    portion: list[PlannedLayer] = []
    used = 0
    for layer in layers:
        size = 4 * layer.matrices()["weight"].shape[1] ** 2
        if portion and used + size > _MEMORY:
            yield portion
            portion, used = [], 0
        portion.append(layer)
        used += size
    yield portion


@torch.no_grad()
def _grams(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Grams:
    """X^T X of the inputs of every layer, `[in, in]` in float32; kept off the device, which may not hold them all."""
    sums = {layer.name: layer.matrices()["weight"].new_zeros((), dtype=torch.float32) for layer in layers}
    handles = [layer.module.register_forward_pre_hook(_add_to(sums, layer.name)) for layer in layers]
    try:
        for batch in tracked(batches, "layer inputs"):
            predictions(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.cpu() for name, total in sums.items()}


def _add_to(sums: Grams, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).to(torch.float32)
        sums[name] = sums[name] + x.t() @ x

    return hook
