"""Tokens on disk, cut into windows of equal length."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from lightning_modules.data.encode import encode_row
from lightning_modules.data.rows import Row
from qat.atomic import replaced_file
from qat.errors import InputError

IGNORED = -100  # the label that cross entropy skips
NOT_LEARNED = np.uint32(1 << 31)  # set on tokens that are read but not learned
_ENCODING = 2  # raised when rows are turned into tokens in another way, so that cached tokens are not reused


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a token stream; documents follow one another, each closed by its end token.

    Args:
        tokens: uint32 ids, the highest bit set on tokens that are read but not learned.
        length: tokens of a window; a shorter rest is dropped.

    Raises:
        InputError: if the stream is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, length: int, name: str = "text") -> None:
        if len(tokens) < length:
            raise InputError(
                f"The {name} has {len(tokens)} tokens, less than one window of {length}: give more text, or set "
                f"data.sequence_length to at most {max(len(tokens), 2)}."
            )
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return as_example(self.tokens[index * self.length : (index + 1) * self.length])


class Accompanied(Dataset[dict[str, Tensor]]):
    """Windows, each with something of its own beside its tokens.

    Args:
        windows: of tokens.
        beside: called with the number of a window.
    """

    def __init__(self, windows: Dataset[dict[str, Tensor]], beside: Callable[[int], dict[str, Tensor]]) -> None:
        self.windows, self.beside = windows, beside

    def __len__(self) -> int:
        return len(self.windows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.windows[index] | self.beside(index)


class WindowStream(IterableDataset[dict[str, Tensor]]):
    """Windows of a stream that has no known length; resuming reads on from the same window.

    Args:
        rows: called once an epoch.
        tokenizer: of transformers.
        length: tokens of a window.
        rank, world_size: this process sees every `world_size`-th window, from `rank` on, and all see equally many.
    """

    def __init__(
        self, rows: Callable[[], Iterable[Row]], tokenizer: Any, length: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows, self.tokenizer, self.length = rows, tokenizer, length
        self.rank, self.world_size = rank, world_size
        self.skip = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        skip, self.skip = self.skip, 0
        windows = self._windows()
        rounds = zip(*[windows] * self.world_size, strict=False)
        for together in islice(rounds, skip, None):
            yield as_example(together[self.rank])

    def _windows(self) -> Iterator[np.ndarray]:
        rest = np.empty(0, dtype=np.uint32)
        for row in self.rows():
            rest = np.concatenate([rest, encode_tokens(row, self.tokenizer)])
            while len(rest) >= self.length:
                window, rest = rest[: self.length], rest[self.length :]
                yield window


class ResumableSampler(Sampler[int]):
    """A random order for each epoch, a function of (seed, epoch) alone, that can start in its middle.

    Args:
        size: number of windows.
        seed: of the order.
        rank, world_size: this process sees every `world_size`-th window, from `rank` on.
    """

    def __init__(self, size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.seed = size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.resume_at: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.world_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        own = order[: len(self) * self.world_size][self.rank :: self.world_size]
        first = 0
        if self.resume_at is not None and self.resume_at[0] == self.epoch:
            first = self.resume_at[1]
        self.resume_at = None
        return iter(own[first:].tolist())


def as_example(window: np.ndarray) -> dict[str, Tensor]:
    """`input_ids` and `labels` `[length]`; tokens that are not learned have the label -100."""
    ids = (window & ~NOT_LEARNED).astype(np.int64)
    labels = np.where(window & NOT_LEARNED, IGNORED, ids)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def encode_tokens(row: Row, tokenizer: Any) -> np.ndarray:
    """One row as uint32 tokens."""
    encoded = encode_row(row, tokenizer)
    ids = np.asarray(encoded.ids, dtype=np.uint32)
    return np.where(np.asarray(encoded.learned, dtype=bool), ids, ids | NOT_LEARNED)


def cached_tokens(rows: Iterable[Row], tokenizer: Any, identity: Any, cache_dir: str | Path) -> np.ndarray:
    """Tokenize `rows` once: the tokens are kept in `cache_dir` and memory-mapped from there.

    Args:
        identity: JSON-able; what the rows depend on (files, their sizes and times). The tokenizer is added.
    """
    key = hashlib.sha256(json.dumps([_ENCODING, identity, tokenizer_identity(tokenizer)]).encode()).hexdigest()[:16]
    path = Path(cache_dir).expanduser() / "tokens" / f"{key}.npy"
    if not path.is_file():
        parts = [encode_tokens(row, tokenizer) for row in rows]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
        with replaced_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, tokens)
    return np.load(path, mmap_mode="r")


def tokenizer_identity(tokenizer: Any) -> list[str]:
    """Everything about `tokenizer` that tokens depend on."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(sorted(tokenizer.get_vocab().items())) if fast is None else fast.to_str()
    return [type(tokenizer).__name__, rules, str(tokenizer.eos_token_id), str(tokenizer.chat_template)]
