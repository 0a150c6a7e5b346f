"""Run data through a prepared model so that static quantizers find their qparams."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.quantizers import Quantizer


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Observe the activations of `batches`, then initialize every quantizer that needs it, in place.

    While observing, those quantizers pass activations through unchanged. Shapes of parameters never change.

    Args:
        model: a prepared model.
        batches: what the model takes: mappings are passed as keywords, tuples as positions, anything else as one
            argument.

    Returns:
        `model`.

    Raises:
        InputError: if there are quantizers to calibrate but no batches, or batches that never reach them, or if one of
            them saw NaN or infinity.
    """
    waiting = uncalibrated(model)
    if not waiting:
        return model
    for quantizer in waiting.values():
        quantizer.observer = quantizer.make_observer()
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            _call(model, batch)
        for name, quantizer in waiting.items():
            quantizer.initialize_from(_summary(name, quantizer))
            quantizer.initialized = True
    finally:
        for quantizer in waiting.values():
            quantizer.observer = None
        model.train(was_training)
    return model


def _summary(name: str, quantizer: Quantizer) -> Tensor:
    """What the observer of `quantizer` has seen."""
    assert quantizer.observer is not None
    summary = quantizer.observer.summary()
    if summary is None:
        raise InputError(f"{name} saw no data while calibrating: give calibrate at least one batch that reaches it.")
    if not quantizer.observer.finite:
        raise InputError(
            f"{name} saw NaN or infinity while calibrating, which no grid holds: look for the batch, or for the layer "
            "before, that makes them; a model in float16 may need bfloat16."
        )
    return summary


def uncalibrated(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of `model` that have nothing to quantize with yet, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and not module.initialized
    }


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)
