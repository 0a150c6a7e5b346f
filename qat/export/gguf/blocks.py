"""The block types of GGUF whose grids are ours to the bit, and which of them holds a grid.

A block is a run of consecutive columns of a row: its codes, its scale, and for some types its offset. Sources: `ggml`
of llama.cpp; MXFP4 is OCP Microscaling Formats 1.0.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.gguf import codes as layouts
from qat.export.gguf.codes import CodeLayout
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.layouts.words import signed, unsigned
from qat.numerics.formats import CodebookFormat, FloatFormat, Format, IntFormat, LevelFormat
from qat.numerics.granularity import PerGroup
from qat.numerics.qtensor import QParams, QuantizedTensor

_TERNARY = (-1.0, 0.0, 1.0)
# The table of IQ4_NL, which no quantizer here trains yet: one with a fixed table of any values would.
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        name: as `gguf.GGMLQuantizationType` has it.
        format: of the codes.
        size: columns of a block.
        layout: of the codes.
        fields: what a block holds, in its order: `scale`, `offset` and `codes`.
        scale_dtype: of scales and offsets.
        table: what codes of a codebook stand for.
    """

    name: str
    format: Format
    size: int
    layout: CodeLayout
    fields: tuple[str, ...] = ("scale", "codes")
    scale_dtype: torch.dtype = torch.float16
    table: tuple[int, ...] | None = None

    @property
    def widths(self) -> list[int]:
        """Bytes of each of `fields`."""
        return [self.layout.size if field == "codes" else self.scale_dtype.itemsize for field in self.fields]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.size * sum(self.widths)

    def to_bytes(self, q: QuantizedTensor) -> Tensor:
        """The blocks of a matrix that the type holds, `[rows, bytes of a row]`, uint8."""
        assert isinstance(q.qparams.scale, Tensor)
        parts = {"scale": _bytes_of(q.qparams.scale)}
        if q.qparams.offset is not None:
            parts["offset"] = _bytes_of(q.qparams.offset)
        codes = q.codes.contiguous().view(-1, self.size)
        parts["codes"] = self.layout.pack(_from_lowest(codes, q.format))
        return torch.cat([parts[field] for field in self.fields], dim=1).view(q.shape[0], -1)

    def from_bytes(self, data: Tensor, name: str, dtype: torch.dtype) -> QuantizedTensor:
        """The inverse of `to_bytes`, for the tensor `name` with values in `dtype`.

        Raises:
            InputError: if bytes stand for no code, or a scale is no number.
        """
        rows = data.shape[0]
        fields = dict(zip(self.fields, data.reshape(-1, sum(self.widths)).split(self.widths, dim=1), strict=True))
        scale, offset = (
            fields[field].contiguous().view(self.scale_dtype).view(rows, -1) if field in fields else None
            for field in ("scale", "offset")
        )
        assert scale is not None
        codes = self.layout.unpack(fields["codes"]).view(rows, -1)
        numbers = [scale] if offset is None else [scale, offset]
        low, high = self.format.code_range
        if int(codes.max()) > high - low:
            raise InputError(f"{name} is damaged: its blocks hold codes that {self.name} does not have.")
        if not all(bool(number.float().isfinite().all()) for number in numbers):
            raise InputError(f"{name} is damaged: it has scales that are no numbers.")
        codebook = None if self.table is None else torch.tensor([self.table], dtype=torch.float32)
        own = signed(codes, self.format) if isinstance(self.format, IntFormat) else codes.to(self.format.code_dtype)
        return QuantizedTensor(own, QParams(scale, None, codebook, offset), self.format, PerGroup(self.size), dtype)


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("Q4_0", IntFormat(4), 32, layouts.NIBBLES),
        BlockType("Q4_1", IntFormat(4, signed=False), 32, layouts.NIBBLES, ("scale", "offset", "codes")),
        BlockType("Q5_0", IntFormat(5), 32, layouts.FIVES),
        BlockType("Q5_1", IntFormat(5, signed=False), 32, layouts.FIVES, ("scale", "offset", "codes")),
        BlockType("Q8_0", IntFormat(8), 32, layouts.BYTES),
        BlockType("TQ2_0", LevelFormat(3), 256, layouts.TWOS, ("codes", "scale")),
        BlockType("TQ1_0", LevelFormat(3), 256, layouts.THREES, ("codes", "scale")),
        BlockType("MXFP4", FloatFormat(2, 1), 32, layouts.NIBBLES, scale_dtype=torch.float8_e8m0fnu),
        BlockType("IQ4_NL", CodebookFormat(16), 32, layouts.NIBBLES, table=_IQ4_NL),
    )
}
TERNARY_TYPES = ("TQ2_0", "TQ1_0")
_TRAINED_BITS = (4, 5, 8)
_UNNESTED = {"MXFP4": "quantizer@scheme.weight=mxfp4"}


def holder(grid: WeightGrid, ternary: str) -> BlockType | None:
    """The block type that holds `grid` to the bit, if there is one; for three levels the one called `ternary`."""
    found = [block for block in BLOCK_TYPES.values() if not any(True for _ in _differences(block, grid))]
    return next((block for block in found if block.name not in TERNARY_TYPES or block.name == ternary), None)


def misfits(grid: WeightGrid) -> Iterator[Misfit]:
    """What keeps every block type from holding `grid`, told by the nearest; nothing if one holds it."""
    block = _nearest(grid)
    if block is None:
        yield from _other_codes(grid)
    else:
        yield from _differences(block, grid)


def _nearest(grid: WeightGrid) -> BlockType | None:
    """A type whose codes these are."""
    return next((block for block in BLOCK_TYPES.values() if _same_codes(block, grid)), None)


def _same_codes(block: BlockType, grid: WeightGrid) -> bool:
    """Whether codes mean the same in both, before they are scaled."""
    if grid.zero_point or grid.offset != ("offset" in block.fields):
        return False
    if block.format == LevelFormat(len(_TERNARY)) and grid.format == CodebookFormat(len(_TERNARY)):
        return _is_table(grid.codebook, _TERNARY) or _is_unseen_ternary(grid)
    if block.format != grid.format:
        return False
    return block.table is None or _is_table(grid.codebook, block.table)


def _is_table(codebook: Tensor | None, values: tuple[float, ...]) -> bool:
    """Whether one codebook of these values serves a whole tensor, known before training."""
    if codebook is None or codebook.is_meta or codebook.numel() != len(values):
        return False
    return codebook.flatten().tolist() == list(values)


def _is_unseen_ternary(grid: WeightGrid) -> bool:
    """Whether a codebook of three entries, on the meta device as before training, is -1, 0 and 1.

    Learned codebooks are stored in the dtype of the scales, fixed ones, of which one has three entries, in float32.
    """
    table = grid.codebook
    return table is not None and table.is_meta and table.dtype == torch.float32 != grid.scale


def _differences(block: BlockType, grid: WeightGrid) -> Iterator[Misfit]:
    """What keeps `block` from holding `grid`."""
    if not _same_codes(block, grid):
        yield Misfit(f"{grid.format.name} codes", "quantizer@scheme.weight=lsq")
    if grid.scale != block.scale_dtype:
        yield _other_scales(block, grid)
    columns = grid.shape[-1]
    if grid.group_size != block.size and columns % block.size == 0:
        yield Misfit(f"scales {grid.granularity}", f"scheme.weight.granularity=per_group_{block.size}")
    elif columns % block.size:
        yield Misfit(f"{columns} columns, which do not fill blocks of {block.size}", _fewer_columns(block))


def _fewer_columns(block: BlockType) -> str:
    if block.name in TERNARY_TYPES:
        return "quantizer@scheme.weight=lsq scheme.weight.bits=4 scheme.weight.granularity=per_group_32"
    return 'scheme.exclude=["THE LAYER"]'


def _other_scales(block: BlockType, grid: WeightGrid) -> Misfit:
    if isinstance(grid.scale, WeightGrid):
        reason = "scales that are quantized themselves, in other superblocks than those of K-quants and NVFP4"
        return Misfit(reason, _UNNESTED.get(block.name, "scheme.weight.double_quant=false"))
    if block.name == "MXFP4":
        return Misfit("scales that are no powers of two", "quantizer@scheme.weight=mxfp4")
    return Misfit("scales that are not float16", "scheme.weight.scale_dtype=float16")


def _other_codes(grid: WeightGrid) -> Iterator[Misfit]:
    """For codes that no type has; the nearest are signed integers."""
    bits = min(_TRAINED_BITS, key=lambda b: (abs(b - grid.format.bits), b))
    mend = f"quantizer@scheme.weight=lsq scheme.weight.bits={bits}"
    if grid.zero_point:
        # Q4_1 adds an offset in float16, and the product of a scale and a zero point has too many digits for that.
        yield Misfit("zero points, whose products with the scales float16 does not hold", mend)
    elif isinstance(grid.format, IntFormat):
        yield Misfit(f"{grid.format.bits} bits", f"scheme.weight.bits={bits}")
    else:
        yield Misfit(f"{grid.format.name} codes", mend)
    if grid.scale != torch.float16:
        yield Misfit("scales that are not float16", "scheme.weight.scale_dtype=float16")
    if grid.group_size != BLOCK_TYPES["Q4_0"].size:
        yield Misfit(f"scales {grid.granularity}", "scheme.weight.granularity=per_group_32")


def _bytes_of(numbers: Tensor) -> Tensor:
    """`[blocks, bytes of a number]`."""
    return numbers.contiguous().view(-1, 1).view(torch.uint8)


def _from_lowest(codes: Tensor, format: Format) -> Tensor:
    return unsigned(codes, format) if isinstance(format, IntFormat) else codes.to(torch.uint8)
