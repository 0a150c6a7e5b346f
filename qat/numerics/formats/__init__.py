"""Formats: which values a code can stand for.

A format turns scaled values into codes and codes into grid values. It knows neither scales nor who shares them.
"""

from qat.numerics.formats.base import Format, as_index
from qat.numerics.formats.codebook import CodebookFormat
from qat.numerics.formats.floats import FloatFormat
from qat.numerics.formats.integer import IntFormat
from qat.numerics.formats.levels import LevelFormat
from qat.numerics.formats.names import parse_format
from qat.numerics.formats.vector import VectorFormat

__all__ = [
    "CodebookFormat",
    "FloatFormat",
    "Format",
    "IntFormat",
    "LevelFormat",
    "VectorFormat",
    "as_index",
    "parse_format",
]
