"""The cross entropy of a linear layer's outputs, without ever holding all of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qat.kernels.linear import compute_dtype


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    scale: float = 1.0,
    softcap: float | None = None,
    ignored: int = -100,
) -> Tensor:
    """sum_i -log softmax(z_i)[target_i] with z = scale * (x W^T + b), or softcap * tanh(z / softcap).

    Of `chunk` rows at a time the logits become the softmax, minus one at the target, which is their gradient; the
    products with it give the gradients of x and W at once. So nothing of the size of all logits exists, nothing is
    computed twice, and as many products are made as by a linear layer and its loss. Softmax and sums are in float32.

    Args:
        x: `[tokens, in]`.
        weight: `[vocabulary, in]`.
        bias: `[vocabulary]` or None.
        targets: `[tokens]`, indices of the vocabulary.
        chunk: how many tokens at a time.
        scale: multiplies the logits.
        softcap: bounds them; None does not.
        ignored: tokens with this target count nothing.

    Returns:
        The sum over all tokens that count, float32.
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    found: Tensor = _LinearCrossEntropy.apply(
        x.to(dtype), weight.to(dtype), bias, targets, chunk, scale, softcap, ignored, torch.is_grad_enabled()
    )
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
        ignored: int,
        with_gradients: bool,
    ) -> Tensor:
        need_x, need_weight, need_bias = (need and with_gradients for need in ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        # Sums over chunks are in float32, like those over tokens within a matrix product.
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        for rows in _chunks(len(x), chunk):
            own, counts = x[rows], targets[rows] != ignored
            z, slope = _shaped(F.linear(own, weight, bias), scale, softcap)
            target = torch.where(counts, targets[rows], 0)[:, None]
            log_p = F.log_softmax(z, 1, dtype=torch.float32)
            del z
            loss -= torch.where(counts[:, None], log_p.gather(1, target), 0).sum()
            if dx is None and dweight is None and dbias is None:
                continue
            dz = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
            dz = dz if slope is None else dz.mul_(slope)
            if dbias is not None:
                dbias += counts.float() @ dz
            dz = dz.to(x.dtype)
            # What does not count is left out on the side of x, which is smaller than the logits.
            if dx is not None:
                torch.mm(dz, weight, out=dx[rows]).mul_(counts[:, None])
            if dweight is not None:
                _add_product(dweight, dz.T, own * counts[:, None])
        ctx.gradients = dx, dweight, dbias
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = ctx.gradients
        ctx.gradients = None
        x_dtype, weight_dtype = ctx.dtypes
        return (
            None if dx is None else dx.mul_(grad).to(x_dtype),
            None if dweight is None else dweight.mul_(grad).to(weight_dtype),
            None if dbias is None else dbias.mul_(grad).to(weight_dtype),
            *(None,) * 6,
        )


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))


def _shaped(z: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits that z becomes and their derivative; None is 1."""
    if softcap is None:
        return (z, None) if scale == 1 else (z.float() * scale, torch.full((), scale, device=z.device))
    bounded = z.float().mul_(scale / softcap).tanh_()
    slope = (1 - bounded.square()).mul_(scale)
    return bounded.mul_(softcap), slope


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place where the dtypes are the same."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
