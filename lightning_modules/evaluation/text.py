"""A text as one stream of tokens, and the windows in which a model reads it."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.data.module import CausalLMDataModule
from lightning_modules.data.windows import IGNORED
from qat.errors import InputError


class Text(NamedTuple):
    """`ids` `[tokens]`, and `labels` `[tokens]` that are -100 where a token is read but not predicted."""

    ids: Tensor
    labels: Tensor


class Window(NamedTuple):
    """Tokens from `start` to `end`, of which those from `first` on are predicted: no other window predicts them."""

    start: int
    first: int
    end: int


def text_of(data: CausalLMDataModule) -> Text:
    """The evaluation text of `data`, its windows put together again."""
    examples = [example for batch in data.val_dataloader() for example in zip(*batch.values(), strict=True)]
    ids, labels = (torch.cat(part) for part in zip(*examples, strict=True))
    return Text(ids, labels)


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` tokens, each `stride` further on, that together predict all tokens but the first.

    With a stride of `length` they do not overlap, and the first token of each has no past and is not predicted. With
    less, every token but those of the first window is predicted from at least `length - stride` others.

    Raises:
        InputError: if the stride is not from 1 to `length`, or a window has no two tokens.
    """
    if length < 2:
        raise InputError(f"window is {length}: a prediction needs at least 2 tokens.")
    if not 1 <= stride <= length:
        raise InputError(f"stride is {stride}: it lies between 1 and the window, {length}.")
    seen = 0
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        first = max(seen, start + 1)
        if first < end:
            yield Window(start, first, end)
        seen = end
        if end == tokens:
            return


def batches(found: list[Window], size: int) -> Iterator[tuple[Window, ...]]:
    """At most `size` windows of equal length at a time."""
    for _, alike in groupby(found, key=lambda window: window.end - window.start):
        some = list(alike)
        yield from (tuple(some[at : at + size]) for at in range(0, len(some), size))


def labels_of(text: Text, window: Window) -> Tensor:
    """`[tokens of the window]`: -100 for what is not predicted."""
    labels = text.labels[window.start : window.end].clone()
    labels[: window.first - window.start] = IGNORED
    return labels
