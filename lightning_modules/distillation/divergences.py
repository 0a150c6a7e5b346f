"""How far the distribution q of a student is from the distribution p of its teacher, and the gradient of that.

Each function takes log p and log q, `[rows, vocabulary]`, which are not to be used afterwards, and returns the
divergence of each row `[rows]` in nats and its gradient with respect to the student's logits `[rows, vocabulary]`.
For any divergence sum_i f(p_i, q_i) that is

    d/da_j = q_j (f'_j - sum_i q_i f'_i)    with f'_i = df/dq_i and q = softmax(a).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qat.errors import InputError, nearest
from qat.options import require_within


class Divergence(NamedTuple):
    """One of them, and what a kernel needs to know of it (`qat.kernels.logits.divergence.Mix`).

    Attributes:
        compute: the function of log p and log q.
        forward, reverse: shares of KL(p || q) and KL(q || p).
        between: beta of jsd, which is none of both; else None.
    """

    compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    forward: float = 0.0
    reverse: float = 0.0
    between: float | None = None


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum_i p_i log(p_i / q_i), with the gradient q - p.

    The student covers all that the teacher holds possible. "Distilling the Knowledge in a Neural Network" (arXiv
    1503.02531).
    """
    p = log_p.exp()
    losses = log_p.sub_(log_q).mul_(p).sum(-1)
    return losses, log_q.exp_().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum_i q_i log(q_i / p_i), with the gradient q_j (log(q_j / p_j) - KL(q || p)).

    The student keeps to what its teacher holds likely. "MiniLLM" (arXiv 2306.08543).
    """
    q = log_q.exp()
    terms = log_q.sub_(log_p).mul_(q)
    losses = terms.sum(-1, keepdim=True)
    return losses[:, 0], terms.sub_(q.mul_(losses))


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, between both directions of KL.

    Its gradient is (1 - beta) q_j (log(q_j / m_j) - KL(q || m)). Divided by beta, or by 1 - beta, it becomes KL(p || q)
    for beta near 0, and KL(q || p) for beta near 1. "On-Policy Distillation of Language Models" (arXiv 2306.13649).
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p, q = log_p.exp(), log_q.exp()
    of_p = log_p.sub_(log_m).mul_(p).sum(-1)
    terms = log_q.sub_(log_m).mul_(q)
    of_q = terms.sum(-1, keepdim=True)
    losses = beta * of_p + (1 - beta) * of_q[:, 0]
    return losses, terms.sub_(q.mul_(of_q)).mul_(1 - beta)


def cakld(log_p: Tensor, log_q: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """gamma KL(q || p) + (1 - gamma) KL(p || q): the surer the teacher, the more the student keeps to its mode.

    gamma is the mean probability that the teacher gives to the next token of the data. "BitDistiller: Unleashing the
    Potential of Sub-4-Bit LLMs via Self-Distillation" (arXiv 2402.10631).
    """
    p, q = log_p.exp(), log_q.exp()
    log_ratio = log_q.sub_(log_p)
    forward = torch.mul(log_ratio, p, out=log_p).sum(-1).neg_()
    terms = log_ratio.mul_(q)
    reverse = terms.sum(-1, keepdim=True)
    losses = gamma * reverse[:, 0] + (1 - gamma) * forward
    gradient = terms.addcmul_(q, reverse, value=-1).mul_(gamma)
    return losses, gradient.add_(q.sub_(p), alpha=1 - gamma)


DIVERGENCES = ("cakld", "forward_kl", "jsd", "reverse_kl")


def divergence_of(name: str, beta: float = 0.5, gamma: float | None = None) -> Divergence:
    """The divergence called `name`.

    Args:
        beta: of `jsd`, between 0 and 1 and neither of them.
        gamma: of `cakld`, from 0 to 1.

    Raises:
        InputError: if there is none of that name, or its number is out of range.
    """
    if name not in DIVERGENCES:
        raise InputError(f"distill.divergence is '{name}'.{nearest(str(name), DIVERGENCES)}")
    if name == "jsd":
        require_within("distill.beta", beta, 0.5, 0, 1)
        if beta in (0, 1):
            raise InputError(
                f"distill.beta is {beta}, where jsd is 0 whatever the student does: set it to 0.5, or "
                f"distill.divergence={'forward_kl' if beta == 0 else 'reverse_kl'}, which is its limit."
            )
        return Divergence(partial(jsd, beta=beta), between=beta)
    if name == "cakld":
        require_within("distill.gamma", gamma, 0.5, 0, 1)
        assert gamma is not None
        return Divergence(partial(cakld, gamma=gamma), 1 - gamma, gamma)
    return Divergence(forward_kl, forward=1.0) if name == "forward_kl" else Divergence(reverse_kl, reverse=1.0)
