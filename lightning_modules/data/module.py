"""LightningDataModules for causal language models."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_modules.data.rows import Row, hub_rows, read_rows, text_files
from lightning_modules.data.windows import Accompanied, ResumableSampler, Windows, WindowStream, cached_tokens
from qat.errors import InputError

Batch = dict[str, Tensor]


class CausalLMDataModule(pl.LightningDataModule):
    """Windows of tokens in an order that depends on the seed alone, and that a checkpoint resumes in its middle.

    Args:
        tokenizer: of transformers.
        sequence_length: tokens of a window.
        batch_size: windows of a training batch.
        val_batch_size: windows of an evaluation batch.
        val_windows: evaluate on at most so many windows; None takes all.
        seed: of the order.
        cache_dir: where tokens are kept between runs.
        num_workers: processes that load batches.

    Attributes:
        beside: called with the number of a training window, gives what a training batch holds beside its tokens; None:
            nothing. Batches to calibrate with never have it.
    """

    def __init__(
        self,
        tokenizer: Any,
        sequence_length: int = 512,
        batch_size: int = 8,
        val_batch_size: int = 8,
        val_windows: int | None = None,
        seed: int = 0,
        cache_dir: str = "~/.cache/lightning-qat",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if sequence_length < 2:
            raise InputError(f"data.sequence_length is {sequence_length}; a window needs at least 2 tokens.")
        sizes = {"batch_size": batch_size, "val_batch_size": val_batch_size, "val_windows": val_windows}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"data.{name} is {size}; it starts at 1.")
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size, self.val_batch_size, self.val_windows = batch_size, val_batch_size, val_windows
        self.seed, self.cache_dir, self.num_workers = seed, cache_dir, num_workers
        self.train_windows: Dataset[Batch] | None = None
        self.held_out: Dataset[Batch] | None = None
        self.beside: Callable[[int], Batch] | None = None
        self._resume_at: tuple[int, int] | None = None

    @abstractmethod
    def make_windows(self) -> tuple[Dataset[Batch], Dataset[Batch]]:
        """Training and evaluation windows."""

    def setup(self, stage: str | None = None) -> None:
        if self.train_windows is None:
            self.train_windows, self.held_out = self.make_windows()

    def train_dataloader(self) -> DataLoader[Batch]:
        """The share that this process has of the training windows."""
        return self._train_loader(*self._share(), self.beside)

    def calibration_dataloader(self) -> DataLoader[Batch]:
        """The same training windows in every process, so that all find the same scales."""
        return self._train_loader(0, 1)

    def order(self) -> list[int]:
        """The numbers of all training windows as the first epoch of one process goes through them.

        Of several processes each takes the next one in turn.
        """
        self.setup()
        return list(ResumableSampler(len(self.train_windows), self.seed))  # type: ignore[arg-type]

    def _train_loader(
        self, rank: int, world_size: int, beside: Callable[[int], Batch] | None = None
    ) -> DataLoader[Batch]:
        self.setup()
        assert self.train_windows is not None
        if isinstance(self.train_windows, WindowStream):
            self.train_windows.rank, self.train_windows.world_size = rank, world_size
            self.train_windows.skip = self._resume_at[1] * self.batch_size if self._resume_at else 0
            return self._loader(self.train_windows, self.batch_size)
        sampler = ResumableSampler(len(self.train_windows), self.seed, rank, world_size)  # type: ignore[arg-type]
        if len(sampler) < self.batch_size:
            raise InputError(
                f"The training text fills {len(sampler)} windows of {self.sequence_length} tokens, less than one batch "
                f"of {self.batch_size}: set data.batch_size to at most {len(sampler)}, or a smaller "
                "data.sequence_length."
            )
        if self._resume_at is not None:
            epoch, batches = self._resume_at
            sampler.resume_at = (epoch, batches * self.batch_size)
        windows = self.train_windows if beside is None else Accompanied(self.train_windows, beside)
        return self._loader(windows, self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        self.setup()
        assert self.held_out is not None
        windows = self.held_out
        if self.val_windows is not None and len(windows) > self.val_windows:  # type: ignore[arg-type]
            windows = Subset(windows, range(self.val_windows))
        return self._loader(windows, self.val_batch_size)

    def state_dict(self) -> dict[str, int]:
        loop = self.trainer.fit_loop.epoch_loop  # type: ignore[union-attr]
        return {"epoch": self.trainer.current_epoch, "batches": loop.batch_progress.current.processed}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume_at = (state["epoch"], state["batches"])

    def _share(self) -> tuple[int, int]:
        """Rank and number of the processes that share the training windows."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _tokens(self, rows: Iterable[Row], identity: Any) -> Any:
        return cached_tokens(rows, self.tokenizer, identity, self.cache_dir)

    def _loader(self, windows: Dataset[Batch], batch_size: int, **options: Any) -> DataLoader[Batch]:
        # A generator of its own: otherwise every new iterator would draw from the global one.
        return DataLoader(
            windows, batch_size, num_workers=self.num_workers, generator=torch.Generator().manual_seed(0), **options
        )


class TextDataModule(CausalLMDataModule):
    """Local text: a .txt, .jsonl or .parquet file, or a folder of them.

    Args:
        path: to train on.
        val_path: to evaluate on; None holds back the last `val_share` of the training windows.
        val_share: between 0 and 1.
        options: see `CausalLMDataModule`.
    """

    def __init__(
        self, tokenizer: Any, path: str, val_path: str | None = None, val_share: float = 0.05, **options: Any
    ) -> None:
        super().__init__(tokenizer, **options)
        if not 0 < val_share < 1:
            raise InputError(f"data.val_share is {val_share}; it lies between 0 and 1.")
        self.path, self.val_path, self.val_share = path, val_path, val_share

    def make_windows(self) -> tuple[Dataset[Batch], Dataset[Batch]]:
        train = self._read_train()
        if self.val_path is not None:
            return train, self._read(self.val_path, "evaluation text")
        kept = len(train) - max(1, round(len(train) * self.val_share))
        if kept < 1:
            raise InputError(
                f"{self.path} fills only {len(train)} window of {self.sequence_length} tokens, and one is held back to "
                "evaluate on: give more text, a smaller data.sequence_length, or data.val_path."
            )
        return Subset(train, range(kept)), Subset(train, range(kept, len(train)))

    def _read_train(self) -> Windows:
        return self._read(self.path, "training text")

    def _read(self, path: str, name: str) -> Windows:
        files = text_files(path)
        identity = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        tokens = self._tokens((row for file in files for row in read_rows(file)), identity)
        return Windows(tokens, self.sequence_length, name)


class HubDataModule(CausalLMDataModule):
    """A dataset of the Hugging Face hub.

    Args:
        name: of the dataset.
        subset: its configuration, where it has several.
        split, val_split: to train and to evaluate on, in the syntax of datasets (`train[:1%]`).
        streaming: read the training split while it downloads, in its own order, never whole.
        val_rows: rows of the evaluation split to read when streaming.
        options: see `CausalLMDataModule`.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        subset: str | None = None,
        split: str = "train",
        val_split: str = "validation",
        streaming: bool = False,
        val_rows: int = 200,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if streaming and self.num_workers:
            raise InputError(f"data.num_workers is {self.num_workers}; a stream has one reader: set it to 0.")
        self.name, self.subset, self.split, self.val_split = name, subset, split, val_split
        self.streaming, self.val_rows = streaming, val_rows

    def make_windows(self) -> tuple[Dataset[Batch], Dataset[Batch]]:
        if not self.streaming:
            return self._read(self.split), self._read(self.val_split)
        train = WindowStream(partial(self._rows, self.split), self.tokenizer, self.sequence_length)
        return train, self._read(self.val_split, self.val_rows)

    def _rows(self, split: str) -> Iterable[Row]:
        return hub_rows(self.name, split, self.subset, self.streaming)

    def _read(self, split: str, rows: int | None = None) -> Windows:
        data = self._rows(split)
        # A dataset that is edited has another fingerprint; a stream has none.
        version = getattr(data, "_fingerprint", None)
        tokens = self._tokens(islice(data, rows), [self.name, self.subset, split, rows, version])
        return Windows(tokens, self.sequence_length, f"split {split} of {self.name}")


def packaged_text(name: str) -> str:
    """Path of a text that ships with the project: `factbook.train`, `factbook.val`."""
    return str(Path(__file__).parent / "text" / f"{name}.txt")
