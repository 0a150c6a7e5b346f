"""Cross entropy and divergence from the teacher, mixed, of some rows of logits, with their gradient."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.data.windows import IGNORED
from lightning_modules.distillation.divergences import Divergence
from lightning_modules.distillation.top_k import TopK, top_k_of
from lightning_modules.head import AS_IS, Shape
from qat.kernels import dispatch
from qat.kernels.logits.reference import shaped


class Losses(NamedTuple):
    """What rows of logits lose.

    Attributes:
        cross_entropy, divergence: of each row `[rows]`, in nats; the divergence times temperature^2.
        gradient: of their weighted sum with respect to the head's outputs `[rows, vocabulary]`, if it was wanted.
    """

    cross_entropy: Tensor
    divergence: Tensor
    gradient: Tensor | None


@dataclass(frozen=True)
class LogitLoss:
    """(1 - weight) CE(q, next token) + weight T^2 D(softmax(v_teacher / T), softmax(v / T)), v the logits.

    T^2 keeps the gradient's size whatever T is ("Distilling the Knowledge in a Neural Network", arXiv 1503.02531).

    Attributes:
        divergence: D.
        weight: from 0 to 1.
        temperature: T, positive.
        top_k: how many of the teacher's likeliest tokens are told apart; None: all.
        shape, teacher_shape: what becomes of the heads' outputs, student's and teacher's.
    """

    divergence: Divergence
    weight: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    shape: Shape = AS_IS
    teacher_shape: Shape = AS_IS

    @torch.no_grad()
    def __call__(self, z: Tensor, teacher: Tensor | TopK, targets: Tensor, with_gradient: bool = True) -> Losses:
        """The losses of rows of logits.

        Args:
            z: outputs of the head `[rows, vocabulary]`, overwritten.
            teacher: those of the teacher's, overwritten; or its top k, at this temperature.
            targets: the next tokens `[rows]`; rows whose target is -100 have loss and gradient 0.
        """
        if isinstance(teacher, Tensor) and self._is_fused(z, teacher):
            return self._fused(z, teacher, targets, with_gradient)
        counts, dtype = targets != IGNORED, z.dtype
        v, slope = shaped(z, *self.shape)
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        divergences, of_divergence = self._divergence(v, teacher)
        log_q = F.log_softmax(v, -1)
        target = torch.where(counts, targets, 0)[:, None]
        cross_entropies = torch.where(counts, -log_q.gather(-1, target)[:, 0], 0)
        divergences = torch.where(counts, divergences, 0).mul_(self.temperature**2)
        if not with_gradient:
            return Losses(cross_entropies, divergences, None)
        gradient = of_divergence.mul_(self.weight * self.temperature)
        if self.weight < 1:
            of_target = log_q.exp_().scatter_add_(-1, target, log_q.new_full(target.shape, -1))
            gradient.add_(of_target, alpha=1 - self.weight)
        gradient = gradient if slope is None else gradient.mul_(slope)
        # Selected, not multiplied: what does not count is 0 whatever its logits are.
        return Losses(cross_entropies, divergences, gradient.masked_fill_(~counts[:, None], 0).to(dtype))

    def _is_fused(self, z: Tensor, teacher: Tensor) -> bool:
        """Whether a kernel computes it: on a GPU, where all tokens are told apart."""
        all_tokens = self.top_k is None or self.top_k == z.shape[-1]
        return all_tokens and dispatch.runs_triton(z) and torch.float64 not in (z.dtype, teacher.dtype)

    def _fused(self, z: Tensor, teacher: Tensor, targets: Tensor, with_gradient: bool) -> Losses:
        from qat.kernels.logits.divergence import Mix, losses_and_gradient

        which = self.divergence.forward, self.divergence.reverse, self.divergence.between
        mix = Mix(*which, self.weight, self.temperature, tuple(self.shape), tuple(self.teacher_shape), IGNORED)
        return Losses(*losses_and_gradient(z, teacher, targets, mix, with_gradient))

    def _divergence(self, v: Tensor, teacher: Tensor | TopK) -> tuple[Tensor, Tensor]:
        """D of each row, and its gradient with respect to v / T."""
        a = self._tempered(v)
        if isinstance(teacher, TopK):
            return self._of_few(a, teacher)
        b = self._tempered(shaped(teacher, *self.teacher_shape)[0].to(v.dtype))
        if self.top_k is None or self.top_k == v.shape[-1]:
            return self.divergence.compute(F.log_softmax(b, -1), F.log_softmax(a, -1))
        return self._of_few(a, top_k_of(b, self.top_k))

    def _of_few(self, a: Tensor, top_k: TopK) -> tuple[Tensor, Tensor]:
        few, rest = top_k.few(a)
        losses, gradient = self.divergence.compute(top_k.log_p_as(a.dtype), F.log_softmax(few, -1))
        return losses, top_k.back(gradient, few, rest)

    def _tempered(self, v: Tensor) -> Tensor:
        return v if self.temperature == 1 else v / self.temperature
