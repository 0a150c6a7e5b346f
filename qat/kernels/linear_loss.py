"""A loss of a linear layer's outputs, without ever holding all of them."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qat.kernels import dispatch
from qat.kernels.linear import compute_dtype
from qat.kernels.logits import reference


class LossOfLogits(Protocol):
    """The losses of some rows of logits, and their gradient."""

    def __call__(self, z: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Find the loss of each of `rows`.

        Args:
            z: `[rows, vocabulary]`, those rows of x W^T + b; may be overwritten.
            rows: which of all tokens they are.
            with_gradient: whether it is wanted.

        Returns:
            the losses `[rows]`, and the gradient of their sum with respect to z, in the dtype of z.
        """


def linear_loss(x: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, loss: LossOfLogits) -> Tensor:
    """sum_i loss_i(z_i) with z = x W^T + b, of `chunk` rows at a time.

    The logits of a chunk become their gradient, and the products with it give the gradients of x and W at once. So
    nothing of the size of all logits exists, nothing is computed twice, and as many products are made as by a linear
    layer and its loss. Sums are in float32 at least.

    Args:
        x: `[tokens, in]`.
        weight: `[vocabulary, in]`.
        bias: `[vocabulary]` or None.
        chunk: how many tokens at a time.
        loss: of rows of logits, with its gradient; what else it depends on gets none.

    Returns:
        The sum over all tokens, float32 or, for float64, as precise.
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    found: Tensor = _LinearLoss.apply(x.to(dtype), weight.to(dtype), bias, chunk, loss, torch.is_grad_enabled())
    return found


def chunks(rows: int, chunk: int) -> Iterator[slice]:
    """Slices of `chunk` rows, the last one shorter."""
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))


def kernels(z: Tensor) -> Any:
    """The module that computes on logits such as `z`."""
    if not dispatch.runs_triton(z):
        return reference
    from qat.kernels.logits import triton

    return triton


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk: int,
        loss: LossOfLogits,
        with_gradients: bool,
    ) -> Tensor:
        need_x, need_weight, need_bias = (need and with_gradients for need in ctx.needs_input_grad[:3])
        # Sums over chunks are in float32, like those over tokens within a matrix product.
        precise = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.empty_like(weight, dtype=precise) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=precise) if need_bias and bias is not None else None
        wanted = not (dx is None and dweight is None and dbias is None)
        for rows in chunks(len(x), chunk):
            losses, dz = loss(F.linear(x[rows], weight, bias), rows, wanted)
            total += losses.sum()
            if dz is None:
                continue
            if dbias is not None:
                dbias += dz.sum(0, dtype=precise)
            if dx is not None:
                torch.mm(dz, weight, out=dx[rows])
            if dweight is not None:
                _add_product(dweight, dz.T, x[rows], first=rows.start == 0)
        if dweight is not None and not len(x):
            dweight.zero_()
        ctx.gradients = dx, dweight, dbias
        ctx.dtypes = x.dtype, weight.dtype
        return total

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
            None if dweight is None else kernels(dweight).times(dweight, grad, weight_dtype),
            None if dbias is None else reference.times(dbias, grad, weight_dtype),
            *(None,) * 3,
        )


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
