"""Soft assignment to a codebook, with memory for one block of it at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values x entries at once.
_CELLS = 2**22


def soft_assign(v: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """Mix the entries of a codebook by their distance to each value (DKM, arXiv 2108.12659).

    v_hat = sum_k p_k c_k, with p = softmax_k(-(v - c_k)^2 / temperature). Nearest-entry assignment is its limit for a
    temperature of zero. With e_k = c_k - v_hat the gradients are

        dv_hat / dv   = (2 / temperature) sum_k p_k e_k c_k
        dv_hat / dc_k = p_k (1 + 2 e_k (v - c_k) / temperature)

    The backward pass computes p again: nothing of the size of weights x entries is ever kept.

    Args:
        v: `[rows, n]` float32.
        codebook: `[rows, entries]` float32.
        temperature: in squared units of v, positive.

    Returns:
        v_hat `[rows, n]`, differentiable once to v and to the codebook.
    """
    return _SoftAssign.apply(v, codebook, temperature)


class _SoftAssign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, codebook: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(v, codebook)
        ctx.temperature = temperature
        v_hat = torch.empty_like(v)
        for rows, columns in _blocks(v, codebook):
            table = codebook[rows]
            shares = _shares(v[rows, columns], table, temperature)
            v_hat[rows, columns] = (shares @ table[:, :, None]).squeeze(2)
        return v_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        v, codebook = ctx.saved_tensors
        dv, dcodebook = torch.empty_like(v), torch.zeros_like(codebook)
        for rows, columns in _blocks(v, codebook):
            table, block, g = codebook[rows, None], v[rows, columns, None], grad[rows, columns, None]
            shares = _shares(block.squeeze(2), table.squeeze(1), ctx.temperature)
            beside = table - (shares * table).sum(2, keepdim=True)
            slope = 2 / ctx.temperature * shares * beside
            dv[rows, columns] = g.squeeze(2) * (slope * table).sum(2)
            dcodebook[rows] += (g * (shares + slope * (block - table))).sum(1)
        return dv, dcodebook, None


def _shares(v: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """p, `[rows, n, entries]`."""
    return (v[:, :, None] - codebook[:, None]).square_().div_(-temperature).softmax(2)


def _blocks(v: Tensor, codebook: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block."""
    (rows, n), entries = v.shape, codebook.shape[1]
    width = max(1, min(n, _CELLS // entries))
    height = max(1, _CELLS // (entries * width))
    for top in range(0, rows, height):
        for left in range(0, n, width):
            yield slice(top, top + height), slice(left, left + width)
