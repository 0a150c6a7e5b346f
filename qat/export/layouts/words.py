"""Codes in 32-bit words, as engines that grew from GPTQ store them."""

import torch
from torch import Tensor

from qat.numerics.formats import IntFormat
from qat.numerics.packing import pack, unpack

WORD = 32


def unsigned(codes: Tensor, format: IntFormat) -> Tensor:
    """Codes counted from the lowest of their format, uint8."""
    return (codes.to(torch.int16) - format.code_range[0]).to(torch.uint8)


def signed(codes: Tensor, format: IntFormat) -> Tensor:
    """The inverse of `unsigned`."""
    return (codes.to(torch.int16) + format.code_range[0]).to(format.code_dtype)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, n]`, uint8, to words `[rows, n * bits / 32]`, int32: code i in bits [b i, b i + b) of its row."""
    rows = codes.shape[0]
    return pack(codes.contiguous(), IntFormat(bits, signed=False)).view(rows, -1).view(torch.int32)


def from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `to_words`."""
    rows, count = words.shape
    shape = (rows, count * WORD // bits)
    return unpack(words.contiguous().view(torch.uint8).view(-1), IntFormat(bits, signed=False), shape)
