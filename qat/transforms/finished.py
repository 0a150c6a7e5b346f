"""Blocks of a model that are done, as files: what a walk through all of them has not lost when it is killed."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.atomic import replaced_file

_NAME = "block{}.safetensors"
# Values of each weight that tell one model from another.
_SAMPLE = 1024


class Finished:
    """Finished blocks as files of a folder, each with the key that its tensors depend on.

    Args:
        folder: None keeps nothing.
        key: blocks of another one are not taken up.
    """

    def __init__(self, folder: str | Path | None, key: str) -> None:
        self._folder = None if folder is None else Path(folder)
        self._key = key

    def restore(self, index: int, module: nn.Module) -> bool:
        """Load block `index` if it is there, whole, and of the same key."""
        if self._folder is None or not (path := self._folder / _NAME.format(index)).is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return False
            module.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError):  # of another version: it is made again
            return False
        return True

    def keep(self, index: int, module: nn.Module) -> None:
        """Write block `index`."""
        if self._folder is None:
            return
        tensors = {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
        with replaced_file(self._folder / _NAME.format(index)) as temporary:
            save_file(tensors, temporary, metadata={"key": self._key})


def discard(folder: str | Path) -> None:
    """Remove the finished blocks in `folder`, and the folder if it holds nothing else: the model is saved now."""
    for path in Path(folder).glob(_NAME.format("*")):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files, or was never made
        Path(folder).rmdir()


def fingerprint(model: nn.Module, data: Iterable[Tensor]) -> str:
    """Of the data, and of a sample of every weight."""
    digest = hashlib.sha256()
    for tensor in data:
        digest.update(_bytes(tensor))
    for name, tensor in model.state_dict().items():
        step = max(1, tensor.numel() // _SAMPLE)
        digest.update(f"{name} {list(tensor.shape)}".encode() + _bytes(tensor.reshape(-1)[::step]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
