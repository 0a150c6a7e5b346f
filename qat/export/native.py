"""The native artifact as one of the targets."""

from pathlib import Path
from typing import Any

from torch import nn

from qat.export.artifact import load, save
from qat.export.targets import Target


class Native(Target):
    """What `qat.load` reads: every grid, KV caches and nested codes included."""

    title = "the native artifact"

    def check(self, model: nn.Module) -> None:
        """It holds everything."""

    def write(self, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
        return save(model, folder, tokenizer)

    def read(self, folder: str | Path, trust_remote_code: bool = False) -> nn.Module:
        return load(folder, trust_remote_code=trust_remote_code)
