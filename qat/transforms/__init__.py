"""Transforms: whole-model operations before and after training."""

from qat.transforms.calibrate import calibrate, uncalibrated
from qat.transforms.importance import fisher, hessian
from qat.transforms.prepare import convert, prepare, quant_linears
from qat.transforms.rules import Rule, Scheme

__all__ = ["Rule", "Scheme", "calibrate", "convert", "fisher", "hessian", "prepare", "quant_linears", "uncalibrated"]
