"""Transforms: whole-model operations before and after training."""

from qat.transforms.autoround import autoround
from qat.transforms.awq import awq
from qat.transforms.calibrate import calibrate, uncalibrated
from qat.transforms.convert import convert
from qat.transforms.finished import discard
from qat.transforms.gptq import gptq
from qat.transforms.hadamard import rotate
from qat.transforms.importance import fisher, hessian
from qat.transforms.layers import codebooks, is_quantized, quant_layers, quantizes_weights
from qat.transforms.neighbours import Fold, fold_scale_, neighbours
from qat.transforms.prepare import prepare
from qat.transforms.prune import magnitude, sparsegpt, wanda
from qat.transforms.reconstruct import reconstruct
from qat.transforms.rules import KVCache, Rule, Scheme
from qat.transforms.shard import shard
from qat.transforms.slice_bits import nested_widths, slice_bits
from qat.transforms.smoothquant import smoothquant
from qat.transforms.structure import restructure
from qat.transforms.structured import structured

__all__ = [
    "Fold",
    "KVCache",
    "Rule",
    "Scheme",
    "autoround",
    "awq",
    "calibrate",
    "codebooks",
    "convert",
    "discard",
    "fisher",
    "fold_scale_",
    "gptq",
    "hessian",
    "is_quantized",
    "magnitude",
    "neighbours",
    "nested_widths",
    "prepare",
    "quant_layers",
    "quantizes_weights",
    "reconstruct",
    "restructure",
    "rotate",
    "shard",
    "slice_bits",
    "smoothquant",
    "sparsegpt",
    "structured",
    "uncalibrated",
    "wanda",
]
