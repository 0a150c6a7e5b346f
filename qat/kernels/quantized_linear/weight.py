"""A packed weight as kernels read it, and back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qat.kernels.quantized_linear.layout import GRID_TABLE, INTEGERS, TABLE, Layout
from qat.kernels.quantized_linear.tiles import (
    STEP_COLUMNS,
    TILE_ROWS,
    from_tiles,
    rows_of_pairs,
    tiles_shape,
    to_scale_words,
    to_tiles,
    to_zero_words,
)
from qat.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat, LevelFormat
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.packing import pack, packed_bytes
from qat.numerics.qtensor import QParams, QuantizedTensor

# Entries of a grid table are whole numbers over this.
GRID = 64
# Values of a weight that are there at a time: on a CPU they stay in its cache, on a GPU they bound the temporaries.
_CPU_BLOCK, _GPU_BLOCK = 2**21, 2**24
# A table for all rows is stored so many times: see `skinny.tables_of_row`.
_COPIES = 8


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """A weight in tile order: what `quantized_linear` multiplies.

    tiles: codes, int32 `[rows of tiles, words]`; see `tiles.py`.
    scale: int32 `[rows of tiles, steps, 8, words]` for groups; float32 `[rows]` where a row has one.
    zero: zero points, int32, laid out as the scales of groups; None where all share `layout.center`.
    table: float32 `[1 or rows, entries]`; None for integers.
    words: the table as kernels load it, by the dtype of x; see `table_words`.
    """

    tiles: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    layout: Layout
    words: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @property
    def wide_scales(self) -> bool:
        """Whether scales of groups take 32 bits and not 16."""
        group = self.layout.group
        return bool(group) and self.scale.shape[-1] * group != STEP_COLUMNS

    @property
    def one_table(self) -> bool:
        """Whether all rows share a table, or there is none."""
        return self.table is None or len(self.table) == 1

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        found = (self.tiles, self.scale, self.zero, self.table, *self.words.values())
        return [tensor for tensor in found if tensor is not None]

    def words_for(self, dtype: torch.dtype) -> Tensor | None:
        """The table as kernels load it for x of `dtype`, kept for the next call; None for integers."""
        if self.table is None:
            return None
        if dtype not in self.words:
            with torch.inference_mode(False):  # whose tensors no training could use afterwards
                self.words[dtype] = table_words(self.table, self.layout, dtype)
        return self.words[dtype]


def tiled(q: QuantizedTensor) -> TiledWeight | None:
    """`q`, a matrix, in tile order; None where no kernel takes it."""
    return tiled_by_rows(q.shape, q.qparams, q.format, q.granularity, lambda first, last: q.codes[first:last])


def tiled_by_rows(
    shape: Sequence[int],
    qparams: QParams,
    format: Format,
    granularity: Granularity,
    codes: Callable[[int, int], Tensor],
) -> TiledWeight | None:
    """As `tiled`, of a tensor whose codes are asked for in blocks of rows: codes(first, last)."""
    layout = _layout(shape, qparams, format, granularity)
    if layout is None:
        return None
    params, low = qparams.for_view(), format.code_range[0]
    scale, zero = (_of_rows(param, layout, granularity) for param in (params.scale, params.zero_point))
    assert scale is not None
    own_zero = None
    if zero is not None:
        zero = zero - low
        if not bool(((zero >= 0) & (zero < min(128, 2**layout.bits) * 2) & (zero == zero.round())).all()):
            return None
        own_zero = to_zero_words(zero, layout.group or STEP_COLUMNS)
    if layout.kind == GRID_TABLE:
        scale = scale / GRID
    own_scale = to_scale_words(scale, layout.group) if layout.group else scale.flatten().contiguous()
    tiles = torch.empty(
        tiles_shape(layout.rows, layout.columns, layout.bits), dtype=torch.int32, device=own_scale.device
    )
    for first, last in blocks(layout.rows, layout.columns, tiles.device):
        block = codes(first, last)
        own = (block.to(torch.int16) - low).to(torch.uint8) if low else block
        to_tiles(own, layout.bits, layout.tables, out=tiles[first // TILE_ROWS : -(-last // TILE_ROWS)])
    return TiledWeight(tiles, own_scale, own_zero, _table(layout, params.codebook, format, tiles.device), layout)


def blocks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows that begin with a row of tiles, of as many values as shall be there at a time."""
    values = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
    count = max(TILE_ROWS, values // columns // TILE_ROWS * TILE_ROWS)
    for first in range(0, rows, count):
        yield first, min(first + count, rows)


def pack_rows(weight: TiledWeight, format: Format) -> Tensor:
    """The packed codes that `tiled_by_rows` was given, uint8, row by row; a block of rows after the other."""
    rows, columns = weight.layout[:2]
    packed = torch.empty(packed_bytes(rows * columns, format.bits), dtype=torch.uint8, device=weight.tiles.device)
    for first, last in blocks(rows, columns, weight.tiles.device):
        tiles = weight.tiles[first // TILE_ROWS : -(-last // TILE_ROWS)]
        block = replace(weight, tiles=tiles, layout=weight.layout._replace(rows=last - first))
        # Sixteen rows are whole bytes, of any number of bits.
        start = first * columns * format.bits // 8
        own = pack(codes_of(block, format), format)
        packed[start : start + len(own)] = own
    return packed


def codes_of(weight: TiledWeight, format: Format) -> Tensor:
    """The codes that `tiled` was given, `[rows, columns]`."""
    layout = weight.layout
    codes = from_tiles(weight.tiles, layout.bits, layout.rows, layout.columns, layout.tables)
    low = format.code_range[0]
    return (codes.to(torch.int16) + low).to(format.code_dtype) if low else codes


def scales_of(weight: TiledWeight) -> Tensor:
    """What values are multiplied by: float32 `[rows, groups]`, or `[rows, 1]`."""
    layout = weight.layout
    if not layout.group:
        return weight.scale[:, None]
    words, each = weight.scale, STEP_COLUMNS // layout.group
    if words.shape[-1] == each:
        scale = rows_of_pairs(words).contiguous().view(torch.bfloat16).to(torch.float32)
    else:  # float32: row g, then row g + 8, of each group
        pairs = words.view(torch.float32).unflatten(-1, (each, 2)).movedim(-1, 1)
        scale = pairs.transpose(2, 3).reshape(len(words) * TILE_ROWS, -1)
    return scale[: layout.rows, : layout.columns // layout.group]


def zeros_of(weight: TiledWeight) -> Tensor | None:
    """Zero points in float32, shaped as `scales_of`; of codes that begin with 0."""
    if weight.zero is None:
        return None
    groups = weight.layout.columns // weight.layout.group if weight.layout.group else 1
    return rows_of_pairs(weight.zero)[: weight.layout.rows, :groups].to(torch.float32)


def table_words(table: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Tables as kernels load them, int32 `[8 or whole tiles of rows, layout.table_words]`: see `decode.Table`.

    Args:
        table: `[1 or rows, entries]`; whole numbers for a grid table.
        dtype: of x, to which entries are rounded.
    """
    count, entries = table.shape
    missing = 2**layout.bits - entries
    padded = torch.nn.functional.pad(table, (0, missing, 0, -count % TILE_ROWS if count > 1 else 0))
    if layout.kind == GRID_TABLE:
        planes = [(padded + GRID).to(torch.int32)]
    else:
        bits = padded.to(dtype).view(torch.int16).to(torch.int32)
        planes = [bits & 0xFF, bits >> 8 & 0xFF]
    shifts = torch.arange(4, device=table.device, dtype=torch.int32) * 8
    words = torch.cat([(plane.unflatten(1, (-1, 4)) << shifts).sum(2, dtype=torch.int32) for plane in planes], dim=1)
    words = torch.nn.functional.pad(words, (0, layout.table_words - words.shape[1]))
    return words.repeat(_COPIES, 1) if count == 1 else words


def _layout(shape: Sequence[int], qparams: QParams, format: Format, granularity: Granularity) -> Layout | None:
    if len(shape) != 2 or format.block > 1 or qparams.offset is not None or 0 in shape:
        return None
    rows, columns = shape
    group = _group(granularity)
    if group is None:
        return None
    zeros, codebook = qparams.zero_point is not None, qparams.codebook
    if isinstance(format, IntFormat) and format.bits in (2, 3, 4, 8):
        return Layout(rows, columns, format.bits, INTEGERS, None if zeros else -format.code_range[0], group)
    if zeros:
        return None
    bits = max(2, format.bits)
    if isinstance(format, LevelFormat) and format.count % 2 and bits <= 4:
        return Layout(rows, columns, bits, INTEGERS, format.count // 2, group)
    if bits > 4 or not isinstance(format, LevelFormat | FloatFormat | CodebookFormat):
        return None
    if codebook is not None and codebook.numel() // codebook.shape[-1] not in (1, rows):
        return None
    on_grid = codebook is not None and _on_grid(codebook)
    return Layout(rows, columns, bits, GRID_TABLE if on_grid else TABLE, None, group)


def _group(granularity: Granularity) -> int | None:
    if isinstance(granularity, PerTensor | PerToken) or granularity == PerChannel(0):
        return 0
    if not isinstance(granularity, PerGroup):
        return None
    size = granularity.group_size
    return 128 if size % 128 == 0 else size if size in (32, 64) else None


def _on_grid(codebook: Tensor) -> bool:
    whole = codebook.to(torch.float32) * GRID
    return bool(((whole == whole.round()) & (whole >= -64) & (whole < 64)).all())


def _table(layout: Layout, codebook: Tensor | None, format: Format, device: torch.device) -> Tensor | None:
    if not layout.tables:
        return None
    if codebook is None:
        low, high = format.code_range
        every = torch.arange(low, high + 1, device=device).to(format.code_dtype)
        return format.decode(every[None])
    return codebook * GRID if layout.kind == GRID_TABLE else codebook


def _of_rows(param: Tensor | None, layout: Layout, granularity: Granularity) -> Tensor | None:
    """`[groups, 1]` as `[rows, groups of a row]`, for the groups that kernels know: larger ones are taken apart."""
    if param is None:
        return None
    if not isinstance(granularity, PerGroup):
        return param.expand(layout.rows, 1)
    return param.view(layout.rows, -1).repeat_interleave(granularity.group_size // layout.group, dim=1)
