"""Quantizers: how scale, zero point and codebook are obtained."""

from qat.quantizers.base import NoQuantizer, Quantizer
from qat.quantizers.fixed import FixedQuantizer
from qat.quantizers.kmeans import KMeansQuantizer
from qat.quantizers.lsq import LSQQuantizer
from qat.quantizers.microscaling import MicroscalingQuantizer, NVFP4Quantizer
from qat.quantizers.minmax import MinMaxQuantizer
from qat.quantizers.nested import NestedQuantizer
from qat.quantizers.table import TableQuantizer
from qat.quantizers.vector import VectorQuantizer

__all__ = [
    "FixedQuantizer",
    "KMeansQuantizer",
    "LSQQuantizer",
    "MicroscalingQuantizer",
    "MinMaxQuantizer",
    "NVFP4Quantizer",
    "NestedQuantizer",
    "NoQuantizer",
    "Quantizer",
    "TableQuantizer",
    "VectorQuantizer",
]
