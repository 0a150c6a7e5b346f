"""Which kernel multiplies how many tokens by a weight, and how it is launched.

Measured entries come first, by (rows, columns, bits, kind); what is not among them follows a rule. Nothing is tried at
run time: the first call costs a compilation and no more.
"""

from typing import NamedTuple

from qat.kernels.quantized_linear.layout import Layout

# From here on a weight is dequantized once and multiplied by cuBLAS: the tile of `wide.py` would decode it again for
# each 64 tokens (KERNELS.md puts the crossing at 128 to 192).
_DEQUANTIZE_FROM = 160
# Multiprocessors of an H100 or H200; a grid of fewer programs leaves some without work.
_PROCESSORS = 132


class Skinny(NamedTuple):
    """`skinny.py`: warps of a program, those that share a row's columns, registers a thread, and what is ahead."""

    warps: int = 4
    warps_k: int = 4
    registers: int = 168
    ahead_x: bool = False


class Wide(NamedTuple):
    """`wide.py`: rows and tokens of a tile, parts of the columns with programs of their own, stages of the pipeline."""

    rows: int = 64
    tokens: int = 64
    splits: int = 1
    stages: int = 3


class Dequantize(NamedTuple):
    """The weight as a matrix, in memory that all layers share, and cuBLAS."""


Choice = Skinny | Wide | Dequantize

# (rows, columns, bits, kind) -> ((up to so many tokens, choice), ...). Not measured yet.
MEASURED: dict[tuple[int, int, int, str], tuple[tuple[int, Choice], ...]] = {}


def choice(layout: Layout, tokens: int) -> Choice:
    """How to multiply `tokens` by a weight of `layout`."""
    for most, measured in MEASURED.get((layout.rows, layout.columns, layout.bits, layout.kind), ()):
        if tokens <= most:
            return measured
    return rule(layout, tokens)


def rule(layout: Layout, tokens: int) -> Choice:
    """Skinny up to 16 tokens, where its registers suffice; then tiles of 64 rows, split until all processors work."""
    steps = -(-layout.columns // 256)
    if tokens <= 16:
        warps_k = 8 if steps >= 48 else 4 if steps >= 4 else 2 if steps >= 2 else 1
        return Skinny(max(4, warps_k), warps_k, 168 if tokens <= 8 else 255, tokens <= 8)
    if tokens < _DEQUANTIZE_FROM:
        wide = 16 * -(-min(tokens, 64) // 16)
        programs = -(-layout.rows // 64) * -(-tokens // 64)
        splits = 1
        while splits < 4 and programs * splits < _PROCESSORS and steps >= 4 * splits:
            splits *= 2
        return Wide(64, 16 if wide <= 16 else 32 if wide <= 32 else 64, splits)
    return Dequantize()
