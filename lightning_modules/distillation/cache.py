"""The teacher's logits for every training window, on disk: computed once, read while others train."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from lightning_modules.data.windows import IGNORED
from lightning_modules.distillation.top_k import TopK
from lightning_modules.fingerprint import differences
from lightning_modules.loss import next_tokens
from qat.atomic import replaced_folder
from qat.errors import InputError
from qat.options import require_whole

CACHE_DTYPES = ("float16", "float32")
INDICES, LOG_P = "teacher_indices", "teacher_log_p_bits"  # what a batch calls them
# Batches carry logarithms as the integers of the same bits, because a run in bf16-true casts all that is floating.
_BITS = {"float16": np.int16, "float32": np.int32}
_FLOATS = {torch.int16: torch.float16, torch.int32: torch.float32}
_DESCRIPTION = "cache.json"
_FORMAT = 1
_UINT16 = 1 << 16


def top_k_of_batch(beside: Mapping[str, Tensor]) -> TopK:
    """What a batch holds beside its tokens, `[batch, tokens, ...]`, as the top k of all tokens one after the other."""
    log_p = beside[LOG_P].flatten(0, 1)
    return TopK(beside[INDICES].flatten(0, 1), log_p.view(_FLOATS[log_p.dtype]))


class Sizes(NamedTuple):
    """Of a cache: windows, tokens of a window, likeliest tokens that are told apart, tokens in all."""

    windows: int
    tokens: int
    top_k: int
    vocabulary: int


class TeacherCache:
    """A folder of memory-mapped arrays; a window is either complete in all of them or not marked as done.

    - `indices.npy` `[windows, tokens, k]`: the teacher's likeliest tokens, uint16 where all fit, otherwise int32
    - `log_p.npy` `[windows, tokens, k + 1]`: their logarithmic probabilities and that of all others together
    - `next_log_p.npy` `[windows, tokens]`: that of the next token at temperature 1, for gamma of CAKLD
    - `done.npy` `[windows]`, and `cache.json`: what all of it depends on

    A token takes 2 k + 2 (k + 1) + 4 bytes for up to 65536 tokens of a vocabulary and float16. The files have their
    final size from the beginning, as holes, which take no space on most file systems.

    Args:
        folder: where it is, or will be.
        sizes: of the arrays.
        dtype: of `log_p`, one of `CACHE_DTYPES`; float16 is exact to 2^-11 of each logarithm, and float32 to the bit.
        source: JSON-able, by readable names: what else the teacher's logits depend on.

    Raises:
        InputError: if an option is no such choice, or the folder holds something else.
    """

    def __init__(self, folder: str | Path, sizes: Sizes, dtype: str, source: Mapping[str, Any]) -> None:
        require_whole("distill.top_k", sizes.top_k, 100)
        if sizes.top_k >= sizes.vocabulary:
            raise InputError(
                f"distill.top_k is {sizes.top_k}, and the vocabulary has {sizes.vocabulary} tokens: distill.cache "
                "keeps some of them, so set it to 100, or to less than all."
            )
        self.folder, self.sizes, self.dtype = Path(folder).expanduser().absolute(), sizes, dtype
        made = {"format": _FORMAT, "dtype": dtype, **sizes._asdict(), **source}
        self._description = json.loads(json.dumps(made))
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which map the files themselves."""
        return {name: value for name, value in vars(self).items() if name != "_arrays"}

    def create(self) -> None:
        """Make the folder, complete at once, unless it is there."""
        if self.folder.is_dir():
            return
        windows, tokens, k, vocabulary = self.sizes
        index = np.uint16 if vocabulary <= _UINT16 else np.int32
        with replaced_folder(self.folder) as temporary:
            open_memmap(temporary / "indices.npy", "w+", index, (windows, tokens, k))
            open_memmap(temporary / "log_p.npy", "w+", np.dtype(self.dtype), (windows, tokens, k + 1))
            open_memmap(temporary / "next_log_p.npy", "w+", np.float32, (windows, tokens))
            open_memmap(temporary / "done.npy", "w+", np.bool_, (windows,))
            (temporary / _DESCRIPTION).write_text(json.dumps(self._description, indent=1))

    def lacks(self, windows: Sequence[int]) -> bool:
        """Whether one of them is still to be computed."""
        return not self._arrays["done"][list(windows)].all()

    def make_room(self, windows: Sequence[int]) -> None:
        """See that those which are lacking fit on the disk: the system kills what maps a file that finds no room.

        Raises:
            InputError: if they do not.
        """
        lacking = int((~self._arrays["done"][list(windows)]).sum())
        needed = lacking * sum(self._arrays[name][0].nbytes for name in ("indices", "log_p", "next_log_p"))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"distill.cache={self.folder} will take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: "
                "set a smaller distill.top_k, or a folder on another disk."
            )

    def write(self, windows: Sequence[int], top_k: TopK, next_log_p: Tensor) -> None:
        """Keep the teacher's logits of some windows, on disk before they are marked as done.

        Args:
            top_k: of all their tokens, one after the other.
            next_log_p: `[windows * tokens]`.
        """
        arrays, some, tokens = self._arrays, list(windows), self.sizes.tokens
        found = {"indices": top_k.indices, "log_p": top_k.log_p, "next_log_p": next_log_p}
        for name, value in found.items():
            arrays[name][some] = value.cpu().numpy().reshape(len(some), tokens, *value.shape[1:])
            arrays[name].flush()
        arrays["done"][some] = True
        arrays["done"].flush()

    def window(self, index: int) -> dict[str, Tensor]:
        """The teacher's logits for a training window, as a batch holds them beside its tokens.

        Raises:
            InputError: if they were never computed.
        """
        arrays = self._arrays
        if not arrays["done"][index]:
            raise InputError(
                f"distill.cache={self.folder} lacks the training window {index}: start the run again, to have it."
            )
        indices, log_p = arrays["indices"][index].astype(np.int32), arrays["log_p"][index]
        return {INDICES: torch.from_numpy(indices), LOG_P: torch.from_numpy(log_p.view(_BITS[self.dtype]).copy())}

    def confidence(self, windows: Sequence[int], labels: Sequence[Tensor]) -> float:
        """The mean probability of the next token over all of `windows` that are learned: see `teacher.confidence`.

        Args:
            labels: of each window `[tokens]`.

        Raises:
            InputError: if no token is learned.
        """
        learned = torch.stack([next_tokens(own[None]) for own in labels]) != IGNORED
        if not learned.any():
            raise InputError(
                "distill.gamma cannot be measured: no token of the calibration batches is learned. Set it, to 0.5."
            )
        log_p = torch.from_numpy(self._arrays["next_log_p"][list(windows)])
        return float(log_p[learned].exp().mean(dtype=torch.float64))

    @cached_property
    def _arrays(self) -> dict[str, np.memmap]:
        names = ("indices", "log_p", "next_log_p", "done")
        return {name: open_memmap(self.folder / f"{name}.npy", "r+") for name in names}

    def _check(self) -> None:
        """Refuse a folder of something else."""
        if not self.folder.exists():
            return
        file = self.folder / _DESCRIPTION
        if not file.is_file():
            raise InputError(f"distill.cache={self.folder} is no cache of a teacher: give a folder that is not there.")
        changed = differences(json.loads(file.read_text()), self._description)
        if changed:
            raise InputError(
                f"distill.cache={self.folder} was computed with {changed}: give this run a folder of its own, or "
                "delete that one."
            )
