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


class Ring(NamedTuple):
    """`ring.py`: as `Skinny`; `stages` steps are on their way."""

    warps: int = 4
    warps_k: int = 4
    registers: int = 128
    stages: int = 2


class Wide(NamedTuple):
    """`wide.py`: rows and tokens of a tile, parts of the columns with programs of their own, stages of the pipeline.

    Four `warps` hold 64 rows: with eight, two groups of four multiply at the same time. `depth` is how many tiles of 64
    columns, two or four, are loaded and decoded at a time.
    """

    rows: int = 64
    tokens: int = 64
    splits: int = 1
    stages: int = 3
    warps: int = 4
    depth: int = 2


class Dequantize(NamedTuple):
    """The weight as a matrix, in memory that all layers share, and cuBLAS."""


Choice = Skinny | Ring | Wide | Dequantize

# (rows, columns, bits, kind) -> ((up to so many tokens, choice), ...). Not measured yet.
MEASURED: dict[tuple[int, int, int, str], tuple[tuple[int, Choice], ...]] = {}


def choice(layout: Layout, tokens: int) -> Choice:
    """How to multiply `tokens` by a weight of `layout`."""
    for most, measured in MEASURED.get((layout.rows, layout.columns, layout.bits, layout.kind), ()):
        if tokens <= most:
            return measured
    return rule(layout, tokens)


def rule(layout: Layout, tokens: int) -> Choice:
    """Up to 16 tokens a kernel that streams the weight; then tiles of 64 rows, split until all processors work."""
    steps = -(-layout.columns // 256)
    if tokens <= 16:
        return _streams(layout, tokens, steps)
    if tokens < _DEQUANTIZE_FROM:
        programs = -(-layout.rows // 64) * -(-tokens // 64)
        splits = 1
        while splits < 4 and programs * splits < _PROCESSORS and steps >= 4 * splits:
            splits *= 2
        return Wide(64, 32 if tokens <= 32 else 64, splits)
    return Dequantize()


def _streams(layout: Layout, tokens: int, steps: int) -> Skinny | Ring:
    """A ring where there is much to stream; a small weight is over before it is full."""
    warps_k = 4 if steps >= 4 else 2 if steps >= 2 else 1
    large = layout.rows * steps >= 4 * _PROCESSORS * 16 * 16
    if large and _fits_ring(layout):
        return Ring(4, warps_k, 128 if tokens <= 8 else 168)
    return Skinny(4, warps_k, 168 if tokens <= 8 else 255, False)


def _fits_ring(layout: Layout) -> bool:
    """Whether four warps' two slots fit 44 KiB with float32 scales and zero points."""
    params = {0: 0, 128: 2, 64: 3, 32: 6}[layout.group]
    return 4 * 2 * 512 * (layout.bits + params) <= 44 * 1024
