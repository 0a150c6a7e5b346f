"""Switch quantizers off for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qat.nn.kv_quantizer import kv_layers
from qat.quantizers import Quantizer
from qat.transforms.calibrate import uncalibrated


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """No quantizer at work, of whatever tensor, and no dropout: what is measured is the model that is to be kept."""
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    enabled = [quantizer.enabled for quantizer in quantizers]
    attentions: list[tuple[Any, Any]] = [(attention, attention.kv_quantizer) for _, attention, _ in kv_layers(model)]
    was_training = model.training
    model.eval()
    for quantizer in quantizers:
        quantizer.enabled = False
    for attention, _ in attentions:
        attention.kv_quantizer = None
    try:
        yield
    finally:
        for quantizer, before in zip(quantizers, enabled, strict=True):
            quantizer.enabled = before
        for attention, kept in attentions:
            attention.kv_quantizer = kept
        model.train(was_training)


@contextmanager
def uncalibrated_off(model: nn.Module) -> Iterator[None]:
    """Static quantizers that nothing calibrated yet let everything through."""
    waiting = list(uncalibrated(model).values())
    for quantizer in waiting:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in waiting:
            quantizer.enabled = True
