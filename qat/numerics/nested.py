"""Codes whose first bits are the codes of a coarser grid."""

from qat.errors import InputError
from qat.numerics.formats import Format, LevelFormat
from qat.numerics.qtensor import QuantizedTensor


def is_nested(format: Format) -> bool:
    """Whether the first bits of its codes are codes themselves: of 2^b levels around zero."""
    return isinstance(format, LevelFormat) and format.count == 2**format.bits


def sliced(q: QuantizedTensor, bits: int) -> QuantizedTensor:
    """The first `bits` bits of every code, and scales that are larger by the power of two that fits.

    2^b levels have cells of one width, edge to edge from -2^(b-1) to 2^(b-1). Leaving out the last bit of a code merges
    two neighbouring cells into one of twice the width, with its level in the middle: the grid of 2^(b-1) levels and
    twice the scale. So the result is what quantizing with that grid gives, to the bit.

    Args:
        q: of a nested format, with plain scales.
        bits: from 1 to those of `q`.

    Raises:
        InputError: if q is not nested or has fewer bits.
    """
    scale = q.qparams.scale
    if not is_nested(q.format) or isinstance(scale, QuantizedTensor):
        raise InputError(f"Codes of {q.format.name} have no first bits that are codes: train with quantizer=nested.")
    dropped = q.format.bits - bits
    if bits < 1 or dropped < 0:
        raise InputError(f"Codes of {q.format.bits} bits have no first {bits}: choose from 1 to {q.format.bits}.")
    qparams = q.qparams._replace(scale=scale * 2**dropped)
    return QuantizedTensor(q.codes >> dropped, qparams, LevelFormat(2**bits), q.granularity, q.dtype)
