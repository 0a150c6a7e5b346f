"""The losses of logits, some tokens at a time: at the heads of student and teacher, or of logits that are there."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.distillation.lazy_logits import LazyLogits, Linear
from lightning_modules.distillation.logits import LogitLoss
from lightning_modules.distillation.top_k import TopK
from qat.kernels.linear_loss import chunks, linear_loss


@dataclass
class Sums:
    """What all tokens lose together, each term without its weight and without a graph."""

    cross_entropy: Tensor = field(default_factory=lambda: torch.zeros(()))
    divergence: Tensor = field(default_factory=lambda: torch.zeros(()))


def at_heads(student: Linear, teacher: LazyLogits, targets: Tensor, chunk: int, loss: LogitLoss) -> tuple[Tensor, Sums]:
    """The sum of `loss` over all tokens, from what the output heads multiply.

    Of `chunk` tokens at a time both heads make their logits, which become the gradient of the student's and are
    forgotten: see `qat.kernels.linear_loss`. The teacher gets no gradient.

    Args:
        teacher: what its head multiplies, in the dtype of matrix products (`Linear.cast`), or its top k.
        targets: `[tokens]`, -100 where a token counts nothing.

    Returns:
        the sum, differentiable in what the student's head multiplies, and its terms.
    """
    sums = Sums()

    def rows_loss(z: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        return _added(sums, loss, z, teacher.rows(rows), targets[rows], with_gradient)

    return linear_loss(*student, chunk, rows_loss), sums


def of_logits(z: Tensor, teacher: LazyLogits, targets: Tensor, chunk: int, loss: LogitLoss) -> tuple[Tensor, Sums]:
    """The same of logits `[tokens, vocabulary]`, differentiable in z: for heads that are more than a product."""
    sums = Sums()
    total: Tensor = _OfLogits.apply(z, teacher, targets, chunk, loss, sums)
    return total, sums


def _added(
    sums: Sums, loss: LogitLoss, z: Tensor, teacher: Tensor | TopK, targets: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The weighted losses of some rows and their gradient; their terms are added to `sums`."""
    found = loss(z, teacher, targets, with_gradient)
    sums.cross_entropy = sums.cross_entropy.to(z.device) + found.cross_entropy.sum()
    sums.divergence = sums.divergence.to(z.device) + found.divergence.sum()
    weighted = (1 - loss.weight) * found.cross_entropy + loss.weight * found.divergence
    return weighted, found.gradient


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, teacher: LazyLogits, targets: Tensor, chunk: int, loss: LogitLoss, sums: Sums
    ) -> Tensor:
        dz = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        for rows in chunks(len(z), chunk):
            losses, gradient = _added(sums, loss, z[rows].clone(), teacher.rows(rows), targets[rows], dz is not None)
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
