"""Keys or values as a cache holds them: codes, their qparams, and the latest tokens in full precision."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qat.numerics.formats import Format, IntFormat, parse_format
from qat.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, parse_granularity
from qat.numerics.packing import packed_bytes, unpack_rows
from qat.numerics.qtensor import QParams, QuantizedTensor

# More tokens than there are: one scale for all of them.
EVERY_TOKEN = 2**30


class CachedTokens(NamedTuple):
    """Tokens of one layer. x ~ (code - zero_point) * scale for the first ones, and x itself for the others.

    codes: `[batch, kv_heads, quantized, ceil(head_dim / 8) * bits]` uint8, packed by `pack_rows`.
    scale: `[batch, kv_heads, quantized / rows, head_dim / columns]`; static ones have ones for the first three.
    zero_point: shaped like scale, or None for zero.
    tail: `[batch, kv_heads, recent, head_dim]`, the tokens after the quantized ones.
    format, granularity: as they are spelled.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tail: Tensor
    format: str
    granularity: str

    @property
    def quantized(self) -> int:
        """Number of tokens that are codes."""
        return self.codes.shape[-2]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.quantized + self.tail.shape[-2]

    def values(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[begin, end)`, of which the quantized ones are whole groups, as `dtype` holds them."""
        coded = min(end, self.quantized)
        parts = [] if begin >= coded else [self._dequantized(begin, coded, dtype)]
        if end > coded:
            parts.append(self.tail[..., max(0, begin - self.quantized) : end - self.quantized, :].to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _dequantized(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        format, granularity = parse_format(self.format), parse_granularity(self.granularity)
        width = self.tail.shape[-1]
        rows, _ = shared_by(self.granularity, width)

        def own(params: Tensor) -> Tensor:
            return params if rows == EVERY_TOKEN else params[..., begin // rows : end // rows, :]

        codes = unpack_rows(self.codes[..., begin:end, :], format, width)
        qparams = QParams(own(self.scale), None if self.zero_point is None else own(self.zero_point))
        return QuantizedTensor(codes, qparams, format, granularity, dtype).dequantize()


@lru_cache
def shared_by(granularity: str, head_dim: int) -> tuple[int, int]:
    """Tokens and dimensions of a block that shares a scale; (0, 0) where scales are no such blocks."""
    found = parse_granularity(granularity)
    blocks: dict[type[Granularity], tuple[int, int]] = {
        PerToken: (1, head_dim),
        PerGroup: (1, getattr(found, "group_size", 0)),
        PerBlock: (getattr(found, "rows", 0), getattr(found, "columns", 0)),
        PerTensor: (EVERY_TOKEN, head_dim),
        PerChannel: (EVERY_TOKEN, 1) if found == PerChannel(-1) else (0, 0),
    }
    return blocks.get(type(found), (0, 0))


def takes(format: Format, granularity: Granularity, head_dim: int) -> bool:
    """Whether attention can be computed from codes: integers of 2, 4 or 8 bits whose rows are whole words."""
    return (
        isinstance(format, IntFormat)
        and format.bits in (2, 4, 8)
        and packed_bytes(head_dim, format.bits) % 4 == 0
        and shared_by(str(granularity), head_dim) != (0, 0)
    )
