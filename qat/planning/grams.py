"""X^T X of what flows into linear layers: the Hessian of their own squared output errors."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qat.planning.candidates import PlannedLayer
from qat.planning.predictions import Batch, predictions
from qat.planning.rows import tracked

# Bytes of matrices `[in, in]` that are gathered in one pass over the data.
_MEMORY = 4 * 2**30
Grams = dict[str, Tensor]


def grams(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Grams:
    """X^T X of the inputs of every layer, `[in, in]` in float32; kept off the device, which may not hold them all."""
    found: Grams = {}
    for together in portions(layers):
        found |= _gathered(model, together, batches)
    return found


def portions(layers: Sequence[PlannedLayer]) -> Iterator[list[PlannedLayer]]:
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
    if portion:
        yield portion


@torch.no_grad()
def _gathered(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Grams:
    """The same for layers whose matrices fit the device together, in one pass over the data."""
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
