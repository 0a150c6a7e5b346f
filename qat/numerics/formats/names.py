"""How formats are spelled."""

import re
from functools import lru_cache

from qat.errors import InputError, nearest
from qat.numerics.formats.base import Format
from qat.numerics.formats.codebook import CodebookFormat
from qat.numerics.formats.floats import FloatFormat
from qat.numerics.formats.integer import IntFormat
from qat.numerics.formats.levels import LevelFormat
from qat.numerics.formats.vector import VectorFormat

_FLOATS = {f.name: f for f in (FloatFormat(*sizes) for sizes in ((4, 3), (5, 2), (2, 3), (3, 2), (2, 1)))}
_SPELLINGS = {
    r"int(\d+)": IntFormat,
    r"uint(\d+)": lambda width: IntFormat(width, signed=False),
    r"levels(\d+)": LevelFormat,
    r"codebook(\d+)": CodebookFormat,
    r"vector(\d+)x(\d+)": VectorFormat,
}


@lru_cache
def parse_format(name: str) -> Format:
    """Read a format's name back: `parse_format("int4") == IntFormat(4)`.

    Raises:
        InputError: if no format has this name.
    """
    if name in _FLOATS:
        return _FLOATS[name]
    for spelling, kind in _SPELLINGS.items():
        match = re.fullmatch(spelling, str(name))
        if match:
            return kind(*map(int, match.groups()))
    raise InputError(
        f"There is no format '{name}'.{nearest(str(name), ['int4', 'uint4', *_FLOATS])} Formats are int2 ... int8, "
        f"uint2 ... uint8, {', '.join(_FLOATS)}, levels2 ... levels256, codebook2 ... codebook256, vector256x2."
    )
