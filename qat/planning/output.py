"""Costs from what each layer computes: the error of its output on the data."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from qat.errors import InputError
from qat.planning.candidates import PlannedLayer
from qat.planning.fisher import Cost
from qat.planning.grams import grams
from qat.planning.predictions import Batch


def output(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Cost:
    """|X E^T|^2 / |X W^T|^2: the share of a layer's output that is error, E being the errors of its weights W.

    Both are found through X^T X, the Hessian that GPTQ uses (arXiv 2210.17323). A share, because outputs of different
    layers are of different sizes; what a layer's output means for the loss is not in it.

    Raises:
        InputError: if a layer is not linear.
    """
    refuse_others_than_linear(layers, "output")
    return partial(_cost, grams(model, layers, batches))


def refuse_others_than_linear(layers: Sequence[PlannedLayer], signal: str) -> None:
    """Refuse layers that do not multiply their input by one matrix.

    Raises:
        InputError: if there is one.
    """
    for layer in layers:
        if not isinstance(layer.module, nn.Linear):
            raise InputError(
                f"signal={signal} is for linear layers, and {layer.name} is none: take signal=fisher or kl."
            )


def _cost(grams: Mapping[str, Tensor], layer: PlannedLayer, errors: Mapping[str, Tensor]) -> float:
    (weight,) = layer.matrices().values()
    gram = grams[layer.name].to(weight.device)
    energy = _energy(weight.float(), gram)
    return _energy(errors["weight"], gram) / energy if energy > 0 else 0.0


def _energy(rows: Tensor, gram: Tensor) -> float:
    """|X R^T|^2 = tr(R X^T X R^T)."""
    return float(((rows @ gram) * rows).sum())
