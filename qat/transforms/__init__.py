"""Transforms: whole-model operations before and after training."""

from qat.transforms.calibrate import calibrate, uncalibrated
from qat.transforms.convert import convert
from qat.transforms.gptq import gptq
from qat.transforms.importance import fisher, hessian
from qat.transforms.layers import codebooks, is_quantized, quant_layers, quantizes_weights
from qat.transforms.prepare import prepare
from qat.transforms.prune import magnitude, sparsegpt, wanda
from qat.transforms.rules import KVCache, Rule, Scheme
from qat.transforms.structured import structured

__all__ = [
    "KVCache",
    "Rule",
    "Scheme",
    "calibrate",
    "codebooks",
    "convert",
    "fisher",
    "gptq",
    "hessian",
    "is_quantized",
    "magnitude",
    "prepare",
    "quant_layers",
    "quantizes_weights",
    "sparsegpt",
    "structured",
    "uncalibrated",
    "wanda",
]
