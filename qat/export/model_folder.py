"""The folder of a model: what lies in it whatever the layout of its weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.atomic import recover, replaced_folder
from qat.errors import InputError
from qat.nn import PackedTensor


@contextmanager
def model_folder(
    folder: str | Path, marker: str, model: nn.Module, tokenizer: Any = None, **settings: Any
) -> Iterator[Path]:
    """Yield a temporary folder with the model's configuration, its generation settings and its tokenizer.

    On success it takes the place of `folder`, on failure it is removed.

    Args:
        folder: a new or an empty one, or one of this kind, which is replaced.
        marker: the file that every folder of this kind has.
        model: a model of transformers, or another, which brings nothing.
        tokenizer: of transformers, if there is one.
        settings: what `config.json` says otherwise than the model's own configuration.

    Raises:
        InputError: if the folder holds other files.
    """
    folder = Path(folder)
    recover(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise InputError(f"{folder} holds other files, which writing would replace: choose a new or an empty folder.")
    config: Any = copy.deepcopy(getattr(model, "config", None))
    if config is not None:
        for name, value in settings.items():
            setattr(config, name, value)
    parts: list[Any] = [config, getattr(model, "generation_config", None), tokenizer]
    with replaced_folder(folder) as temporary:
        for part in parts:
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(temporary)
        yield temporary


def computing_dtype(model: nn.Module) -> torch.dtype:
    """What a converted model dequantizes its weights to."""
    return next(module.dtype for module in model.modules() if isinstance(module, PackedTensor))
