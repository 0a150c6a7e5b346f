"""Quantization-aware training: formats, quantizers, layers and export.

prepare(model, scheme)        nn.Linear -> QuantLinear, and so for embeddings, convolutions and experts
calibrate(model, batches)     static activation quantizers find their scales
shard(model)                  weights spread over processes by FSDP2
convert(model)                QuantLinear -> PackedLinear
save(model, folder), load(folder)
"""

from qat.errors import InputError
from qat.export.artifact import save
from qat.export.loading import load
from qat.transforms import Rule, Scheme, calibrate, convert, prepare, shard

__version__ = "0.1.0"
__all__ = ["InputError", "Rule", "Scheme", "calibrate", "convert", "load", "prepare", "save", "shard"]
