"""Launches of the kernels of `wide.py`."""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from qat.kernels.launch import KEPT, Launch
from qat.kernels.quantized_linear import decode, wide
from qat.kernels.quantized_linear.choice import Wide
from qat.kernels.quantized_linear.decode import BFLOAT16, FLOAT16, Table
from qat.kernels.quantized_linear.layout import GRID_TABLE, Layout
from qat.kernels.quantized_linear.step import Assembly, words_of_scales
from qat.kernels.quantized_linear.tiles import STEP_COLUMNS, TILE_COLUMNS, TILE_ROWS, chunks_of_row
from qat.kernels.quantized_linear.weight import TiledWeight
from qat.scratch import scratch

# Triton's interpreter knows no assembly.
_COMPILED = isinstance(wide.wide, triton.runtime.JITFunction)
_SUM_WIDTH = 1024
# Rows of a program that dequantizes: a warp for each row of tiles.
_ROWS = 64


def run(x: Tensor, weight: TiledWeight, words: Tensor | None, bias: Tensor | None, how: Wide) -> Tensor:
    """`[tokens, rows]` of x `[tokens, columns]`, both bfloat16 or float16."""
    layout, tokens = weight.layout, len(x)
    ordered = in_order(x)
    y = torch.empty((tokens, layout.rows), dtype=x.dtype, device=x.device)
    out = y if how.splits == 1 else y.new_empty((how.splits, tokens, layout.rows), dtype=torch.float32)
    form = layout, x.dtype, *_tensors_form(weight)
    absent = y if bias is None else bias
    ready, summing = _ready(*form, bias is not None, tokens, ordered.shape[1], how)
    codes, scale, zero, table, values = _tensors(weight, words, ordered)
    ready(ordered, codes, scale, zero, table, absent, values, out)
    if summing is not None:
        summing(out, scale, absent, y)
    return y


def dequantize(weight: TiledWeight, words: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight `[rows, columns]`, good until the next call: all layers share its memory."""
    layout = weight.layout
    w = scratch("dequantized", torch.Size((layout.rows, layout.columns)), dtype, weight.tiles.device)
    ready = _ready_dequantize(layout, dtype, *_tensors_form(weight))
    ready(*_tensors(weight, words, w), w)
    return w


def in_order(x: Tensor) -> Tensor:
    """A copy of x in the order of k of `tiles.py`: column 32 i + 8 t + 4 s + 2 v + w at 32 i + 16 s + 8 v + 2 t + w."""
    tokens, columns = x.shape
    x = F.pad(x, (0, -columns % TILE_COLUMNS)) if columns % TILE_COLUMNS else x
    return x.reshape(tokens, -1, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(tokens, -1).contiguous()


def _tensors_form(weight: TiledWeight) -> tuple[bool, bool]:
    wide_scales = bool(weight.layout.group) and weight.scale.shape[-1] * weight.layout.group != STEP_COLUMNS
    return wide_scales, weight.table is None or len(weight.table) == 1


def _tensors(weight: TiledWeight, words: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """Codes, scale, zero, table and values as kernels take them; what is absent is stood for by another."""
    absent, values = weight.tiles, like
    if not _COMPILED and weight.table is not None:
        missing = -len(weight.table) % TILE_ROWS if len(weight.table) > 1 else 0
        entries = 2**weight.layout.bits - weight.table.shape[1]
        values = F.pad(weight.table, (0, entries, 0, missing)).to(like.dtype)
    zero, table = (absent if tensor is None else tensor for tensor in (weight.zero, words))
    return weight.tiles, weight.scale, zero, table, values


@lru_cache(KEPT)
def _ready(
    layout: Layout,
    dtype: torch.dtype,
    wide_scales: bool,
    one_table: bool,
    has_bias: bool,
    tokens: int,
    columns: int,
    how: Wide,
) -> tuple[Launch, Launch | None]:
    tile_rows, row_programs = -(-layout.rows // TILE_ROWS), -(-layout.rows // how.rows)
    sizes = {"ROWS": how.rows, "TOKENS": how.tokens, "SPLITS": how.splits, "STAGES": how.stages}
    constants = _constants(layout, dtype, wide_scales, one_table) | {"COLUMNS": columns, "HAS_BIAS": has_bias} | sizes
    numbers = (tokens, layout.rows, tile_rows, row_programs)
    programs = row_programs * how.splits * -(-tokens // how.tokens)
    ready = Launch(wide.wide, programs, numbers, _in_order_of(wide.wide, constants))
    if how.splits == 1:
        return ready, None
    sums = {"SPLITS": how.splits, "GROUP": layout.group, "HAS_BIAS": has_bias, "WIDTH": _SUM_WIDTH}
    count = -(-tokens * layout.rows // _SUM_WIDTH)
    return ready, Launch(wide.sum_parts, count, (tokens, layout.rows), sums)


@lru_cache(KEPT)
def _ready_dequantize(layout: Layout, dtype: torch.dtype, wide_scales: bool, one_table: bool) -> Launch:
    tile_rows, tall = -(-layout.rows // TILE_ROWS), -(-layout.rows // _ROWS)
    constants = _constants(layout, dtype, wide_scales, one_table) | {"ROWS": _ROWS, "COLUMNS": layout.columns}
    programs = tall * -(-layout.columns // TILE_COLUMNS)
    return Launch(wide.dequantize, programs, (layout.rows, tile_rows), _in_order_of(wide.dequantize, constants))


def _in_order_of(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    return {name: constants[name] for name in kernel.arg_names if name in constants}


def _constants(layout: Layout, dtype: torch.dtype, wide_scales: bool, one_table: bool) -> dict[str, Any]:
    assembly = tile_assembly(layout, dtype, one_table) if _COMPILED else Assembly("", "")
    each = STEP_COLUMNS // layout.group if layout.group else 1
    return {
        "TEXT": assembly.text,
        "CONSTRAINTS": assembly.constraints,
        "BITS": layout.bits,
        "CHUNKS": chunks_of_row(layout.columns, layout.bits),
        "STEPS": -(-layout.columns // STEP_COLUMNS),
        "CENTER": layout.center or 0,
        "ENTRIES": 2**layout.bits if layout.tables else 0,
        "GROUP": layout.group,
        "SCALE_WORDS": words_of_scales(layout, wide_scales),
        "ZERO_WORDS": each if layout.has_zeros else 0,
        "TABLE_WORDS": layout.table_words,
        "TABLE_USED": _table_used(layout),
        "ONE_TABLE": one_table,
    }


def _table_used(layout: Layout) -> int:
    """Words of a table, without those that fill it up."""
    return 2**layout.bits // 4 * (1 if layout.kind == GRID_TABLE else 2) if layout.tables else 0


@lru_cache
def tile_assembly(layout: Layout, dtype: torch.dtype, one_table: bool) -> Assembly:
    """Decoding of a word, or for 3 bits of two, as elementwise assembly.

    Results are the registers a0 ... of `decode.integers` as int32; operands the word or words, and those of the tables.
    """
    real = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}[dtype]
    count, inputs = {8: 2, 4: 4, 3: 8, 2: 8}[layout.bits], 2 if layout.bits == 3 else 1
    outs, used = [f"${i}" for i in range(count)], _table_used(layout)
    names = [f"${i}" for i in range(count, count + inputs + used * (1 if one_table else 2))]
    words, tables = names[:inputs], names[inputs:]
    lines = ["{"]
    if not layout.tables:
        setting, offsets = decode.fixed_offsets(layout.center or 0, layout.bits, real, "offset")
        lines += setting + decode.integers(words, 0, layout.bits, real, offsets, outs)
    else:
        each, selectors = 2**layout.bits // 4, ["s0", "s1"][: count // 4]
        own = [Table(part[:each], part[each:]) for part in (tables[:used], tables[-used:])]
        look_up = decode.grid_table if layout.kind == GRID_TABLE else decode.table
        lines += [".reg .b32 s0, s1;", *decode.selectors(words, 0, layout.bits, selectors)]
        for i, selector in enumerate(selectors):
            lines += look_up(selector, 2**layout.bits, own, real, outs[4 * i : 4 * i + 4])
    constraints = ["=&r"] * count + ["r"] * len(names)
    return Assembly("\n".join([*lines, "}"]), ",".join(constraints))
