"""Distributions over a few words and all the others together."""

import torch
from torch import Tensor


class TopK:
    """The words that each row of the teacher's logits holds most likely, and one more for all the rest.

    What is left out counts as one word with their summed probability, so the divergence is one of true distributions
    and at most that over all words: probability that the student gives to the rest is seen, and none is made up for the
    others by renormalising, which would bias them ("Sparse Logit Sampling: Accelerating Knowledge Distillation in
    LLMs", arXiv 2503.16870).

    Args:
        teacher: logits `[rows, vocabulary]`.
        k: how many words, fewer than all.
    """

    def __init__(self, teacher: Tensor, k: int) -> None:
        self.indices = teacher.topk(k, -1).indices

    def few(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[rows, k + 1]`, the last one of the rest, log sum_i exp v_i over it; and v, -inf but for the rest."""
        rest = v.scatter(-1, self.indices, -torch.inf)
        return torch.cat([v.gather(-1, self.indices), rest.logsumexp(-1, keepdim=True)], -1), rest

    def back(self, gradient: Tensor, few: Tensor, rest: Tensor) -> Tensor:
        """The gradient of all logits `[rows, vocabulary]` from that of `few`; the rest shares its own by softmax.

        It is written in the place of `rest`.
        """
        shares = rest.sub_(few[:, -1:]).exp_()
        return shares.mul_(gradient[:, -1:]).scatter_(-1, self.indices, gradient[:, :-1])
