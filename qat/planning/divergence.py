"""Costs as they are: what quantizing one layer alone does to the predictions of the whole model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.planning.candidates import Candidates, PlannedLayer, Table
from qat.planning.predictions import Batch, learned_tokens, predictions
from qat.planning.rounding import make_rounding, to_nearest
from qat.planning.rows import Rows, tracked
from qat.transforms.blocks import find_blocks


@torch.no_grad()
def kl(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    candidates: Candidates,
    batches: Sequence[Batch],
    rows: Rows,
    rounding: str = "nearest",
) -> Table:
    """Mean over tokens of KL(p || p_hat), p_hat predicting with one layer quantized: nats a token.

    The most expensive signal, a forward pass for each batch, layer and candidate, and the only one that approximates
    nothing but that layers add up. Blocks before the quantized layer are computed once a batch, and every layer is
    rounded anew for each batch: few large batches spare the work of a `rounding` that takes long.
    """
    todo = [
        (index, layer, name)
        for index in range(len(batches))
        for layer in layers
        for name in candidates
        if (index, layer.name, name) not in rows
    ]
    rounded = make_rounding(rounding, model, layers, batches) if todo else to_nearest
    reference: _Reference | None = None
    for index, layer, name in tracked(todo, "KL"):
        if reference is None or reference.index != index:
            reference = _Reference(model, layers, index, batches[index])
        rows.add((index, layer.name, name), reference.divergence(layer, rounded(layer, candidates[name])))
    tokens = sum(learned_tokens(batch) for batch in batches)
    return {
        layer.name: {
            name: max(0.0, sum(rows[index, layer.name, name] for index in range(len(batches))) / tokens)
            for name in candidates
        }
        for layer in layers
    }


class _Reference:
    """Full-precision predictions for one batch, and what left every block on the way to them."""

    def __init__(self, model: nn.Module, layers: Sequence[PlannedLayer], index: int, batch: Batch) -> None:
        self.index = index
        self._model, self._batch = model, batch
        self._prefix, blocks = find_blocks(model, (layer.name for layer in layers)) or ("", ())
        self._blocks = list(blocks)
        self._outputs: list[Any] = [None] * len(self._blocks)
        handles = [block.register_forward_hook(_keep(self._outputs, i)) for i, block in enumerate(self._blocks)]
        try:
            self._expected = predictions(model, batch)[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    def divergence(self, layer: PlannedLayer, w_hat: Mapping[str, Tensor]) -> float:
        """KL from full precision where the weights of `layer` are `w_hat`, summed over tokens."""
        with weights_as(layer, w_hat), self._without_blocks_before(layer.name):
            found = predictions(self._model, self._batch)[0].log_softmax(-1)
        return float(F.kl_div(found, self._expected, reduction="sum", log_target=True))

    @contextmanager
    def _without_blocks_before(self, name: str) -> Iterator[None]:
        """Blocks before that of the layer `name` return what they returned before, without computing it."""
        inside = name.startswith(f"{self._prefix}.")
        own = int(name.removeprefix(f"{self._prefix}.").partition(".")[0]) if inside else 0
        for block, output in zip(self._blocks[:own], self._outputs, strict=False):
            block.forward = partial(_returned, output)
        try:
            yield
        finally:
            for block in self._blocks[:own]:
                del block.forward


@contextmanager
def weights_as(layer: PlannedLayer, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The weights of `layer` hold `values`, matrices by name, for a while."""
    matrices = layer.matrices()
    before = {name: matrix.clone() for name, matrix in matrices.items()}
    try:
        for name, value in values.items():
            matrices[name].copy_(value)
        yield
    finally:
        for name, value in before.items():
            matrices[name].copy_(value)


def _keep(outputs: list[Any], index: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(block: nn.Module, args: Any, output: Any) -> None:
        outputs[index] = output

    return hook


def _returned(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
