"""The losses of logits, some tokens at a time: at the heads of student and teacher, or of logits that are there."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_modules.distillation.logits import LogitLoss
from qat.kernels.linear import compute_dtype
from qat.kernels.linear_loss import chunks, linear_loss


class Linear(NamedTuple):
    """Inputs `[tokens, in]`, weight `[vocabulary, in]` and bias `[vocabulary]` of an output head."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def cast(self) -> "Linear":
        """In the dtype of matrix products."""
        dtype = compute_dtype(self.x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Linear(self.x.to(dtype), self.weight.to(dtype), bias)


@dataclass
class Sums:
    """What all tokens lose together, each term without its weight and without a graph."""

    cross_entropy: Tensor = field(default_factory=lambda: torch.zeros(()))
    divergence: Tensor = field(default_factory=lambda: torch.zeros(()))


def at_heads(student: Linear, teacher: Linear, targets: Tensor, chunk: int, loss: LogitLoss) -> tuple[Tensor, Sums]:
    """The sum of `loss` over all tokens, from what the output heads multiply.

    Of `chunk` tokens at a time both heads make their logits, which become the gradient of the student's and are
    forgotten: see `qat.kernels.linear_loss`. The teacher gets no gradient.

    Args:
        targets: `[tokens]`, -100 where a token counts nothing.

    Returns:
        the sum, differentiable in what the student's head multiplies, and its terms.
    """
    x_teacher, weight_teacher, bias_teacher = teacher.cast()
    sums = Sums()

    def rows_loss(z: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        z_teacher = F.linear(x_teacher[rows], weight_teacher, bias_teacher)
        return _added(sums, loss, z, z_teacher, targets[rows], with_gradient)

    return linear_loss(*student, chunk, rows_loss), sums


def of_logits(z: Tensor, z_teacher: Tensor, targets: Tensor, chunk: int, loss: LogitLoss) -> tuple[Tensor, Sums]:
    """The same of logits `[tokens, vocabulary]`, differentiable in z: for heads that are more than a product."""
    sums = Sums()
    total: Tensor = _OfLogits.apply(z, z_teacher, targets, chunk, loss, sums)
    return total, sums


def _added(
    sums: Sums, loss: LogitLoss, z: Tensor, z_teacher: Tensor, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted losses of some rows and their gradient; their terms are added to `sums`."""
    found = loss(z, z_teacher, targets, with_gradient)
    sums.cross_entropy = sums.cross_entropy.to(z.device) + found.cross_entropy.sum()
    sums.divergence = sums.divergence.to(z.device) + found.divergence.sum()
    weighted = (1 - loss.weight) * found.cross_entropy + loss.weight * found.divergence
    return weighted, found.gradient


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, z_teacher: Tensor, targets: Tensor, chunk: int, loss: LogitLoss, sums: Sums
    ) -> Tensor:
        dz = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        for rows in chunks(len(z), chunk):
            own = z[rows].clone(), z_teacher[rows].clone()
            losses, gradient = _added(sums, loss, *own, targets[rows], dz is not None)
            total += losses.sum()
            if dz is not None and gradient is not None:
                dz[rows] = gradient
        ctx.save_for_backward(dz)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = ctx.saved_tensors
        return dz * grad, *(None,) * 5
