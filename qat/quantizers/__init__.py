"""Quantizers: how scale, zero point and codebook are obtained."""

from qat.quantizers.base import NoQuantizer, Quantizer
from qat.quantizers.kmeans import KMeansQuantizer
from qat.quantizers.lsq import LSQQuantizer
from qat.quantizers.minmax import MinMaxQuantizer
from qat.quantizers.nf4 import NF4Quantizer

__all__ = ["KMeansQuantizer", "LSQQuantizer", "MinMaxQuantizer", "NF4Quantizer", "NoQuantizer", "Quantizer"]
