"""The cross entropy of a linear layer's outputs, without ever holding all of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qat.kernels import dispatch
from qat.kernels.linear import compute_dtype
from qat.kernels.logits import reference


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
        dweight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if need_bias and bias is not None else None
        wanted = not (dx is None and dweight is None and dbias is None)
        for rows in _chunks(len(x), chunk):
            z = F.linear(x[rows], weight, bias)
            losses, dz = _kernels(z).loss_and_gradient(z, targets[rows], scale, softcap, ignored, wanted)
            loss += losses.sum()
            if dz is None:
                continue
            if dbias is not None:
                dbias += dz.sum(0, dtype=torch.float32)
            if dx is not None:
                torch.mm(dz, weight, out=dx[rows])
            if dweight is not None:
                _add_product(dweight, dz.T, x[rows], first=rows.start == 0)
        if dweight is not None and not len(x):
            dweight.zero_()
        ctx.gradients = dx, dweight, dbias
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("The loss at the head computes its gradients once: call backward once for each loss.")
        dx, dweight, dbias = ctx.gradients
        ctx.gradients = None
        x_dtype, weight_dtype = ctx.dtypes
        return (
            None if dx is None else dx.mul_(grad).to(x_dtype),
            None if dweight is None else _kernels(dweight).times(dweight, grad, weight_dtype),
            None if dbias is None else reference.times(dbias, grad, weight_dtype),
            *(None,) * 6,
        )


def _kernels(z: Tensor) -> Any:
    """The module that computes on logits."""
    if not dispatch.runs_triton(z):
        return reference
    from qat.kernels.logits import triton

    return triton


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = total + a @ b in place, or the product alone where it is the first; a GPU sums 16 bits in float32."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b
