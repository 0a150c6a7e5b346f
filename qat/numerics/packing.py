"""Bit packing: 8 codes of b bits become exactly b bytes, for every b from 1 to 8.

Code i of eight occupies bits [b*i, b*i + b) of a little-endian word of 8*b bits; the flattened tensor is padded with
zeros to a multiple of eight codes. Signed codes are stored minus the lowest code of their format.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qat.numerics.formats import Format

# Codes that are packed together: in 64-bit words all of a large weight would take eight times its memory.
_AT_ONCE = 2**22


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return math.ceil(count / 8) * bits


def pack(codes: Tensor, format: Format) -> Tensor:
    """Pack codes of any shape into a flat uint8 tensor of `packed_bytes(codes.numel(), format.bits)` bytes."""
    flat = codes.reshape(-1)
    if len(flat) <= _AT_ONCE:
        return _pack(flat, format)
    packed = torch.empty(packed_bytes(len(flat), format.bits), dtype=torch.uint8, device=codes.device)
    for some, place in zip(flat.split(_AT_ONCE), packed.split(packed_bytes(_AT_ONCE, format.bits)), strict=True):
        place.copy_(_pack(some, format))
    return packed


def unpack(packed: Tensor, format: Format, shape: Sequence[int]) -> Tensor:
    """Undo `pack` for a tensor of `shape`."""
    count = math.prod(shape)
    if count <= _AT_ONCE:
        return _unpack(packed, format, count).view(tuple(shape))
    codes = torch.empty(count, dtype=format.code_dtype, device=packed.device)
    for some, place in zip(packed.split(packed_bytes(_AT_ONCE, format.bits)), codes.split(_AT_ONCE), strict=True):
        place.copy_(_unpack(some, format, len(place)))
    return codes.view(tuple(shape))


def _pack(codes: Tensor, format: Format) -> Tensor:
    unsigned = codes.to(torch.int64) - format.code_range[0]
    eights = functional.pad(unsigned, (0, -len(unsigned) % 8)).view(-1, 8)
    words = (eights << _shifts(format.bits, codes.device)).sum(1)
    return words.view(torch.uint8).view(-1, 8)[:, : format.bits].reshape(-1).contiguous()


def _unpack(packed: Tensor, format: Format, count: int) -> Tensor:
    low_bytes = packed.view(-1, format.bits)
    words = functional.pad(low_bytes, (0, 8 - format.bits)).contiguous().view(torch.int64)
    eights = (words >> _shifts(format.bits, packed.device)) & (2**format.bits - 1)
    return (eights.view(-1)[:count] + format.code_range[0]).to(format.code_dtype)


def pack_rows(codes: Tensor, format: Format) -> Tensor:
    """Pack each row of `codes` `[..., width]` to whole bytes: `[..., ceil(width / 8) * bits]`, uint8."""
    padded = functional.pad(codes, (0, -codes.shape[-1] % 8), value=format.code_range[0])
    return pack(padded, format).view(*codes.shape[:-1], -1)


def unpack_rows(packed: Tensor, format: Format, width: int) -> Tensor:
    """Undo `pack_rows` for rows of `width` codes."""
    padded = (*packed.shape[:-1], math.ceil(width / 8) * 8)
    return unpack(packed.reshape(-1), format, padded)[..., :width]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(8, device=device) * bits
