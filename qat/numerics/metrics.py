"""Figures that say how good a quantized tensor is and what it costs."""

import math

import torch
from torch import Tensor

from qat.numerics.packing import packed_bytes
from qat.numerics.qtensor import QuantizedTensor, scale_down


@torch.no_grad()
def sqnr(x: Tensor, x_hat: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 10 log10(sum x^2 / sum (x - x_hat)^2); infinite when equal."""
    signal = x.float().square().sum().item()
    noise = (x.float() - x_hat.float()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def code_use(q: QuantizedTensor) -> float:
    """Share of the format's codes that occur in each codebook row (or in the whole tensor), averaged over rows."""
    return (_code_counts(q) > 0).float().mean().item()


def code_entropy(q: QuantizedTensor) -> Tensor:
    """Shannon entropy of the codes, H = -sum_k p_k log2 p_k, in bits a code, `[rows]`: one for each codebook row.

    A tensor without codebooks is one row. The entropy is at most the format's bits; how far below says what an entropy
    coder would save.
    """
    counts = _code_counts(q)
    p = counts / counts.sum(1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(1) / math.log(2)


def entropy_coded_bits(q: QuantizedTensor) -> float:
    """`stored_bits` if the codes of each row were entropy-coded; scales, zero points and codebooks as stored."""
    others = stored_bits(q) - 8 * packed_bytes(q.codes.numel(), q.format.bits)
    return code_entropy(q).mean().item() * q.codes.numel() + others


@torch.no_grad()
def _code_counts(q: QuantizedTensor) -> Tensor:
    """How often each code of the format occurs, `[rows, codes]` float64: for each codebook row, or the whole tensor."""
    low, high = q.format.code_range
    entries = high - low + 1
    codebook = q.qparams.codebook
    rows = 1 if codebook is None else codebook.numel() // codebook.shape[-1]
    codes = q.granularity.of_codes(q.format.block).view(q.codes).reshape(rows, -1).long() - low
    codes += torch.arange(rows, device=codes.device)[:, None] * entries
    return torch.bincount(codes.view(-1), minlength=rows * entries).view(rows, entries).double()


@torch.no_grad()
def clipped_share(x: Tensor, q: QuantizedTensor) -> float:
    """Share of `x` that lies more than half a step beyond the grid of `q`; a codebook clips nothing."""
    if not q.format.saturates:
        return 0.0
    v = scale_down(q.granularity.view(x), q.qparams.for_view())
    low, high = q.format.range()
    return ((v < low - 0.5) | (v > high + 0.5)).float().mean().item()


def stored_bits(q: QuantizedTensor) -> int:
    """Bits that the artifact spends on `q`: packed codes, scales, zero points, codebooks and offsets."""
    bits = 8 * packed_bytes(q.codes.numel(), q.format.bits)
    for field in q.qparams:
        if isinstance(field, QuantizedTensor):
            bits += stored_bits(field)
        elif field is not None:
            bits += 8 * field.numel() * field.element_size()
    return bits
