"""16-bit patterns and the numbers they stand for, in float64."""

import numpy as np


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def from_f16(bits):
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def to_bf16(values):
    """Refuses what would have to be rounded: decoding is exact."""
    single = np.atleast_1d(values).astype(np.float32)
    bits = single.view(np.uint32) >> np.uint32(16)
    assert (from_bf16(bits) == values).all()
    return bits.reshape(np.shape(values))


def to_f16(values):
    half = np.asarray(values).astype(np.float16)
    assert (half.astype(np.float64) == values).all()
    return half.view(np.uint16).astype(np.uint32)


def round_bf16(values):
    """To the nearest, of two as near the even one."""
    bits = np.atleast_1d(values).astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return rounded.reshape(np.shape(values))


def round_f16(values):
    return np.asarray(values).astype(np.float16).view(np.uint16).astype(np.uint32)


FROM_BITS = {"bf16": from_bf16, "f16": from_f16}
TO_BITS = {"bf16": to_bf16, "f16": to_f16}
ROUND = {"bf16": round_bf16, "f16": round_f16}
