"""Transforms: whole-model operations before and after training."""

from qat.transforms.calibrate import calibrate, uncalibrated
from qat.transforms.convert import convert
from qat.transforms.importance import fisher, hessian
from qat.transforms.layers import codebooks, quant_layers, quantizes_weights
from qat.transforms.prepare import prepare
from qat.transforms.rules import Rule, Scheme

__all__ = [
    "Rule",
    "Scheme",
    "calibrate",
    "codebooks",
    "convert",
    "fisher",
    "hessian",
    "prepare",
    "quant_layers",
    "quantizes_weights",
    "uncalibrated",
]
