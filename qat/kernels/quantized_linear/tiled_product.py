"""Launches of the kernels of `wide.py`."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qat.kernels.launch import KEPT, Launch
from qat.kernels.quantized_linear import wide
from qat.kernels.quantized_linear.decode import REALS
from qat.kernels.quantized_linear.launches import Wide
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.step import TILES, words_of_scales, words_of_zeros
from qat.kernels.quantized_linear.streamed_product import in_words
from qat.kernels.quantized_linear.tile import tile
from qat.kernels.quantized_linear.tiles import STEP_COLUMNS, TILE_ROWS, chunks_of_row
from qat.kernels.quantized_linear.weight import TiledWeight
from qat.scratch import scratch

_SUM_WIDTH = 1024
# Rows of a program that dequantizes: a warp for each row of tiles.
_ROWS = 64
# Words of a program that orders x: 16 bytes a lane, twice.
_ORDER_WORDS = 1024


def run(x: Tensor, weight: TiledWeight, words: Tensor | None, bias: Tensor | None, how: Wide) -> Tensor:
    """`[tokens, rows]` of x `[tokens, columns]`, both bfloat16 or float16.

    Args:
        words: what `table_words` makes of the weight's table; None for integers.
    """
    layout, tokens = weight.layout, len(x)
    ordered = in_order(x, how.tokens)
    y = torch.empty((tokens, layout.rows), dtype=x.dtype, device=x.device)
    out = y if how.splits == 1 else y.new_empty((how.splits, tokens, layout.rows), dtype=torch.float32)
    absent = y if bias is None else bias
    ready, summing = _ready(layout, x.dtype, weight.wide_scales, weight.one_table, bias is not None, tokens, how)
    ready(ordered, *_tensors(weight, words), absent, out)
    if summing is not None:
        summing(out, weight.scale, absent, y)
    return y


def dequantize(weight: TiledWeight, words: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight `[rows, columns]`, good until the next call: all layers share its memory."""
    layout = weight.layout
    w = scratch("dequantized", torch.Size((layout.rows, layout.columns)), dtype, weight.tiles.device)
    ready = _ready_dequantize(layout, dtype, weight.wide_scales, weight.one_table)
    ready(*_tensors(weight, words), w)
    return w


def in_order(x: Tensor, tokens: int = 1) -> Tensor:
    """A copy of x in the order of k of `tiles.py`: column 32 i + 8 t + 4 s + 2 v + w at 32 i + 16 s + 8 v + 2 t + w.

    It has whole steps of columns, filled up with zeros, and whole tiles of `tokens`, whose rest is not written.
    """
    steps = -(-x.shape[1] // STEP_COLUMNS)
    y = torch.empty((-(-len(x) // tokens) * tokens, steps * STEP_COLUMNS), dtype=x.dtype, device=x.device)
    own = in_words(x)
    _ready_order(len(x), own.shape[1] // 2, own.stride(0) // 2, steps)(own.view(torch.int32), y.view(torch.int32))
    return y


def _tensors(weight: TiledWeight, words: Tensor | None) -> tuple[Tensor, ...]:
    """Codes, scale, zero and table as kernels take them; what is absent is stood for by another."""
    absent = weight.tiles
    zero, table = (absent if tensor is None else tensor for tensor in (weight.zero, words))
    return weight.tiles, weight.scale, zero, table


@lru_cache(KEPT)
def _ready(
    layout: Layout, dtype: torch.dtype, wide_scales: bool, one_table: bool, has_bias: bool, tokens: int, how: Wide
) -> tuple[Launch, Launch | None]:
    row_programs = -(-layout.rows // how.rows)
    constants = constants_of(layout, dtype, wide_scales, one_table, how.depth) | {"HAS_BIAS": has_bias} | sizes_of(how)
    numbers = (tokens, layout.rows, -(-layout.rows // TILE_ROWS), row_programs)
    programs = row_programs * how.splits * -(-tokens // how.tokens)
    ready = _launch(wide.wide, programs, numbers, constants, num_warps=how.warps)
    if how.splits == 1:
        return ready, None
    count = -(-tokens * layout.rows // _SUM_WIDTH)
    return ready, _launch(wide.sum_parts, count, (tokens, layout.rows), constants | {"WIDTH": _SUM_WIDTH})


@lru_cache(KEPT)
def _ready_dequantize(layout: Layout, dtype: torch.dtype, wide_scales: bool, one_table: bool) -> Launch:
    constants = constants_of(layout, dtype, wide_scales, one_table) | {"ROWS": _ROWS, "COLUMNS": layout.columns}
    programs = -(-layout.rows // _ROWS) * constants["STEPS"]
    return _launch(wide.dequantize, programs, (layout.rows, -(-layout.rows // TILE_ROWS)), constants)


@lru_cache(KEPT)
def _ready_order(tokens: int, words: int, stride: int, steps: int) -> Launch:
    width = steps * STEP_COLUMNS // 2
    constants = {"WORDS": words, "WIDTH": width, "BLOCK": _ORDER_WORDS}
    return _launch(wide.order, tokens * -(-width // _ORDER_WORDS), (stride,), constants)


def _launch(kernel: Any, programs: int, numbers: tuple[int, ...], constants: dict[str, Any], **options: int) -> Launch:
    own = {name: constants[name] for name in kernel.arg_names if name in constants}
    return Launch(kernel, programs, numbers, own, **options)


def sizes_of(how: Wide) -> dict[str, int]:
    """Compile-time constants of `wide` that `how` names."""
    return {"ROWS": how.rows, "TOKENS": how.tokens, "SPLITS": how.splits, "DEPTH": how.depth, "STAGES": how.stages}


def constants_of(
    layout: Layout, dtype: torch.dtype, wide_scales: bool, one_table: bool, depth: int = TILES
) -> dict[str, Any]:
    """Those of all kernels that decode, `depth` tiles of a step at a time."""
    real = REALS[dtype]
    assemblies = [tile(layout, real, number, depth < TILES, wide_scales, one_table) for number in range(depth)]
    return {
        "TEXTS": tuple(assembly.text for assembly in assemblies),
        "CONSTRAINTS": assemblies[0].constraints,
        "BITS": layout.bits,
        "CHUNKS": chunks_of_row(layout.columns, layout.bits),
        "STEPS": -(-layout.columns // STEP_COLUMNS),
        "SCALE_WORDS": words_of_scales(layout, wide_scales),
        "ZERO_WORDS": words_of_zeros(layout) if layout.group else 0,
        "ZERO_OF_ROW": layout.has_zeros and not layout.group,
        "TABLE_WORDS": layout.table_words,
        "ONE_TABLE": one_table,
        "SCALE_OF_ROW": not layout.group,
    }
