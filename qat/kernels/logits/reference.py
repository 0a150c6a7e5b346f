"""The cross entropy of logits and its gradient in plain PyTorch: the definition, and what a CPU does."""

import torch
from torch import Tensor
from torch.nn import functional as F


def loss_and_gradient(
    z: Tensor, targets: Tensor, scale: float, softcap: float | None, ignored: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """-log softmax(v)[target] of each row with v = scale * z, or softcap * tanh(scale * z / softcap); and d/dz.

    The gradient is (softmax(v) - 1 at the target) * dv/dz.

    Args:
        z: `[rows, vocabulary]`; not to be used afterwards.
        targets: `[rows]`, indices of the vocabulary.
        scale: multiplies the logits.
        softcap: bounds them; None does not.
        ignored: rows with this target have loss and gradient 0.
        with_gradient: whether it is wanted.

    Returns:
        the loss of each row `[rows]` in float32, and the gradient, in the dtype of z.
    """
    counts = targets != ignored
    target = torch.where(counts, targets, 0)[:, None]
    v, slope = shaped(z, scale, softcap)
    log_p = F.log_softmax(v, 1, dtype=torch.float32)
    losses = torch.where(counts, -log_p.gather(1, target)[:, 0], 0)
    if not with_gradient:
        return losses, None
    dz = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
    dz = dz if slope is None else dz.mul_(slope)
    dz[~counts] = 0
    return losses, dz.to(z.dtype)


def times(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor, a number, in `dtype`; `total`, float32, is not to be used afterwards."""
    return total.mul_(factor).to(dtype)


def shaped(z: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits v that z becomes, scale * z or softcap * tanh(scale * z / softcap), and dv/dz; None is 1."""
    precise = torch.promote_types(z.dtype, torch.float32)
    if softcap is None:
        return (z, None) if scale == 1 else (z.to(precise) * scale, torch.full((), scale, device=z.device))
    bounded = z.to(precise).mul_(scale / softcap).tanh_()
    slope = (1 - bounded.square()).mul_(scale)
    return bounded.mul_(softcap), slope
