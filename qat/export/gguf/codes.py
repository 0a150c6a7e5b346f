"""How the blocks of GGUF hold codes: unsigned codes of a block to bytes and back, many blocks at a time.

Layouts as in `ggml-common.h` of llama.cpp; `gguf.quants` reads the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class CodeLayout(NamedTuple):
    """Bytes of a block's codes.

    size: how many there are.
    pack: codes `[blocks, elements]`, uint8, counted from the lowest of their format, to bytes `[blocks, size]`.
    unpack: the inverse.
    """

    size: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def _pack_nibbles(codes: Tensor) -> Tensor:
    first, second = (codes & 0x0F).chunk(2, dim=1)
    return first | second << 4


def _unpack_nibbles(data: Tensor) -> Tensor:
    return torch.cat([data & 0x0F, data >> 4], dim=1)


def _pack_fives(codes: Tensor) -> Tensor:
    fifth = (codes >> 4).view(len(codes), -1, 8) << torch.arange(8, dtype=torch.uint8)
    return torch.cat([fifth.sum(2, dtype=torch.uint8), _pack_nibbles(codes)], dim=1)


def _unpack_fives(data: Tensor) -> Tensor:
    fifth, nibbles = data[:, :4, None], data[:, 4:]
    bits = (fifth >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    return _unpack_nibbles(nibbles) | bits << 4


def _flip_highest(codes: Tensor) -> Tensor:
    return codes ^ 0x80


_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]


def _pack_twos(codes: Tensor) -> Tensor:
    return (codes.view(len(codes), -1, 4, 32) << _SHIFTS).sum(2, dtype=torch.uint8).flatten(1)


def _unpack_twos(data: Tensor) -> Tensor:
    return (data.view(len(data), -1, 1, 32) >> _SHIFTS & 3).flatten(1)


# Digits to the base of three: 32 bytes of five, 16 of five, then 4 of four. Neighbours lie in neighbouring bytes.
_RUNS = ((32, 5), (16, 5), (4, 4))
_DIGITS = 5


def _pack_threes(codes: Tensor) -> Tensor:
    parts = []
    for run, (width, digits) in zip(codes.split([w * d for w, d in _RUNS], dim=1), _RUNS, strict=True):
        powers = 3 ** torch.arange(_DIGITS - 1, _DIGITS - 1 - digits, -1)
        parts.append((run.view(len(codes), digits, width).long() * powers[:, None]).sum(1))
    numbers = torch.cat(parts, dim=1)
    # A number n of five digits is stored as n / 243 in 256ths, rounded up: digits then come from products alone.
    return ((numbers * 256 + 242) // 243).to(torch.uint8)


def _unpack_threes(data: Tensor) -> Tensor:
    parts = []
    for run, (_, digits) in zip(data.split([w for w, _ in _RUNS], dim=1), _RUNS, strict=True):
        fractions = run[:, None, :].int() * 3 ** torch.arange(digits, dtype=torch.int32)[:, None] % 256
        parts.append((fractions * 3 >> 8).flatten(1))
    return torch.cat(parts, dim=1).to(torch.uint8)


NIBBLES = CodeLayout(16, _pack_nibbles, _unpack_nibbles)
FIVES = CodeLayout(20, _pack_fives, _unpack_fives)
BYTES = CodeLayout(32, _flip_highest, _flip_highest)
TWOS = CodeLayout(64, _pack_twos, _unpack_twos)
THREES = CodeLayout(52, _pack_threes, _unpack_threes)
