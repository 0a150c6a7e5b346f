"""Distributions over the k likeliest tokens and all the others together."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class TopK(NamedTuple):
    """The tokens that the teacher holds most likely to follow, for each row, and one more for all the rest.

    What is left out counts as one token with their summed probability, so the divergence is one of true distributions
    and at most that over all tokens: probability that the student gives to the rest is seen, and none is made up for
    the others by renormalising, which would bias them ("Sparse Logit Sampling: Accelerating Knowledge Distillation in
    LLMs", arXiv 2503.16870).

    Attributes:
        indices: of the tokens `[rows, k]`, k fewer than all, the likeliest first.
        log_p: their logarithmic probabilities and that of the rest `[rows, k + 1]`.
    """

    indices: Tensor
    log_p: Tensor

    def rows(self, rows: slice) -> "TopK":
        """Some of the rows."""
        return TopK(self.indices[rows], self.log_p[rows])

    def log_p_as(self, dtype: torch.dtype) -> Tensor:
        """A copy of `log_p`, of float32 or more; what was rounded to 16 bits is normalised again, to sum up to one."""
        if self.log_p.element_size() < torch.finfo(torch.float32).bits // 8:
            return F.log_softmax(self.log_p.to(dtype), -1)
        return self.log_p.to(dtype, copy=True)

    def few(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[rows, k + 1]`, the last one of the rest, log sum_i exp v_i over it; and v, -inf but for the rest."""
        return _few(v, self.indices.long())

    def back(self, gradient: Tensor, few: Tensor, rest: Tensor) -> Tensor:
        """The gradient of all logits `[rows, vocabulary]` from that of `few`; the rest shares its own by softmax.

        It is written in the place of `rest`.
        """
        shares = rest.sub_(few[:, -1:]).exp_()
        return shares.mul_(gradient[:, -1:]).scatter_(-1, self.indices.long(), gradient[:, :-1])


def top_k_of(v: Tensor, k: int) -> TopK:
    """The `k` likeliest tokens of logits `[rows, vocabulary]`, which the temperature has divided."""
    indices = v.topk(k, -1).indices
    return TopK(indices, F.log_softmax(_few(v, indices)[0], -1))


def _few(v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    rest = v.scatter(-1, indices, -torch.inf)
    return torch.cat([v.gather(-1, indices), rest.logsumexp(-1, keepdim=True)], -1), rest
