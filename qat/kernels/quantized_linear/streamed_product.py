"""Launches of the kernels of `skinny.py` and `ring.py`."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.launch import KEPT, Launch
from qat.kernels.quantized_linear import ring, skinny
from qat.kernels.quantized_linear.decode import REALS
from qat.kernels.quantized_linear.launches import Ring, Skinny
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.step import step, words_of_scales, words_of_zeros
from qat.kernels.quantized_linear.tiles import STEP_COLUMNS, TILE_ROWS, chunks_of_row
from qat.kernels.quantized_linear.weight import TiledWeight

# Tokens of a tile of the tensor core's result.
TOKENS = 8
# Between the first row of x and its end, so that offsets in words fit 32 bits.
_MOST_ELEMENTS = 2**32


def run(x: Tensor, weight: TiledWeight, words: Tensor | None, bias: Tensor | None, how: Skinny | Ring) -> Tensor:
    """`[tokens, rows]` of x `[tokens, columns]`, both bfloat16 or float16; up to 32 tokens.

    Args:
        words: what `table_words` makes of the weight's table; None for integers.
    """
    layout, x = weight.layout, in_words(x)
    y = torch.empty((len(x), layout.rows), dtype=x.dtype, device=x.device)
    form = layout, x.dtype, weight.wide_scales, weight.one_table, bias is not None
    ready = _ready(*form, len(x), x.stride(0) // 8, how)
    absent = weight.tiles
    ready(
        x.view(torch.int32),
        weight.tiles,
        weight.scale,
        absent if weight.zero is None else weight.zero,
        absent if words is None else words,
        y if bias is None else bias,
        y,
    )
    return y


def in_words(x: Tensor) -> Tensor:
    """`x`, or a copy of which each row begins at a multiple of 16 bytes and is a multiple of 16 bytes long."""
    if x.shape[1] % 8:
        return F.pad(x, (0, -x.shape[1] % 8))
    fits = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    fits &= x.stride(0) * len(x) < _MOST_ELEMENTS
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@lru_cache(KEPT)
def _ready(
    layout: Layout,
    dtype: torch.dtype,
    wide_scales: bool,
    one_table: bool,
    has_bias: bool,
    tokens: int,
    stride: int,
    how: Skinny | Ring,
) -> Launch:
    tall = how.warps // how.warps_k
    tile_rows = -(-layout.rows // TILE_ROWS)
    kernel: Any = skinny.skinny
    constants = constants_of(layout, dtype, wide_scales, one_table, has_bias, -(-tokens // TOKENS), how)
    if isinstance(how, Ring):
        kernel, constants = ring.ring, constants | ring.constants_of(layout, wide_scales, how)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    numbers = (tokens, layout.rows, tile_rows, stride)
    return Launch(kernel, -(-tile_rows // tall), numbers, constants, how.warps, maxnreg=how.registers)


def constants_of(
    layout: Layout,
    dtype: torch.dtype,
    wide_scales: bool,
    one_table: bool,
    has_bias: bool,
    token_tiles: int,
    how: Skinny | Ring,
) -> dict[str, Any]:
    """Compile-time constants of `skinny`."""
    real = REALS[dtype]
    assembly = step(layout, real, token_tiles, wide_scales, one_table, isinstance(how, Ring))
    return {
        "TEXT": assembly.text,
        "CONSTRAINTS": assembly.constraints,
        "BITS": layout.bits,
        "CHUNKS": chunks_of_row(layout.columns, layout.bits),
        "WORDS": -(-layout.columns // 8) * 4,
        "STEPS": -(-layout.columns // STEP_COLUMNS),
        "SCALE_WORDS": words_of_scales(layout, wide_scales),
        "ZERO_WORDS": words_of_zeros(layout),
        "TABLE_WORDS": layout.table_words,
        "ONE_TABLE": one_table,
        "HAS_BIAS": has_bias,
        "TOKEN_TILES": token_tiles,
        "WARPS": how.warps,
        "WARPS_K": how.warps_k,
        "EVEN": layout.columns % (STEP_COLUMNS * how.warps_k) == 0,
        "AHEAD_X": isinstance(how, Skinny) and how.ahead_x,
    }
