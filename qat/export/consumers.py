"""Engines that load what was exported, to find out what they compute."""

from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Consumer(NamedTuple):
    """An engine that has loaded an export.

    name: of the engine, with its version.
    logits: of token ids `[batch, tokens]`: `[batch, tokens, vocabulary]`.
    """

    name: str
    logits: Callable[[Tensor], Tensor]


class NotInstalled(Exception):
    """The engine is not in this environment; the message says how to get it."""


def versions(*packages: str) -> str:
    """Names and versions of packages.

    Raises:
        NotInstalled: if one is absent.
    """
    for package in packages:
        if util.find_spec(package.replace("-", "_")) is None:
            raise NotInstalled(f"{package} is not installed: pip install {package}")
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def transformers_consumer(folder: Path, *packages: str, **options: Any) -> Consumer:
    """`folder` as transformers loads it by `options`, with the `packages` that know its layout."""
    from transformers import AutoModelForCausalLM

    name = versions("transformers", *packages)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options).eval()

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return found

    return Consumer(name, logits)
