"""How a model writes a text: after a first token of the vocabulary a few are the likeliest, and the rest are drawn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.plain_generation import plain_generation

_NONE = -1  # no token; None would mean the one that the model's own settings have
_PRIME = 1_000_003  # parts the seeds of batches from those of other seeds


class GreedyStart:
    """Lets only the likeliest token follow, as long as a text has at most `tokens` of them.

    Args:
        tokens: for each text of a batch, `[batch]`.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by transformers with the texts so far `[batch, tokens]` and the next logits `[batch, vocabulary]`."""
        likeliest = scores.argmax(-1, keepdim=True)
        alone = torch.full_like(scores, -torch.inf).scatter_(-1, likeliest, 0)
        return torch.where((input_ids.shape[1] <= self.tokens)[:, None], alone, scores)


def first_tokens(allowed: Sequence[int], texts: int, seed: int) -> Tensor:
    """A first token for each text `[texts]`: every one of `allowed` in a random order, then all in another one."""
    generator, tokens = torch.Generator().manual_seed(seed), torch.tensor(allowed)
    rounds = -(-texts // len(tokens))
    return torch.cat([tokens[torch.randperm(len(tokens), generator=generator)] for _ in range(rounds)])[:texts]


@torch.no_grad()
def sample_texts(
    model: Any,
    first: Tensor,
    length: int,
    greedy: Sequence[int],
    temperature: float,
    end: int | None,
    seed: int,
    batch: int,
) -> list[Tensor]:
    """Texts of `model`, which depend on nothing but the arguments: each batch seeds its own draws.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        first: the first token of each text `[batch]`.
        length: of a text at most, its first token included.
        greedy: the least and the most tokens after the first that are the likeliest ones; drawn for each text.
        temperature: divides the logits of those that are drawn.
        end: the token that ends a text, which is its last; None: none does.
        seed, batch: of the draws.

    Returns:
        the tokens of each text.
    """
    from transformers import LogitsProcessorList

    torch.manual_seed(seed * _PRIME + batch)
    tokens = torch.randint(greedy[0], greedy[1] + 1, first.shape)
    first = first.to(next(model.parameters()).device)[:, None]
    # The text shall have the distribution that is distilled.
    with plain_generation(model):
        written = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=length - 1,
            do_sample=True,
            logits_processor=LogitsProcessorList([GreedyStart(tokens.to(first.device))]),
            temperature=float(temperature),
            top_k=0,
            eos_token_id=_NONE if end is None else end,
            pad_token_id=0 if end is None else end,
        ).cpu()
    return [_until(text, end) for text in written]


def _until(text: Tensor, end: int | None) -> Tensor:
    """`text` up to its first `end` after the first token, which is kept."""
    ends = (text[1:] == end).nonzero() if end is not None else text[:0]
    return text[: int(ends[0]) + 2] if len(ends) else text
