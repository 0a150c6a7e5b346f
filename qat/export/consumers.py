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


def onnxruntime_consumer(path: Path) -> Consumer:
    """The model `path` as ONNX Runtime runs it on a CPU.

    Raises:
        NotInstalled: without the package, and for models in bfloat16, for which it has no kernels there.
    """
    name = versions("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # By default it rounds activations to 8 bits beside weights of 4 bits in groups.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        reason = str(error).splitlines()[0]
        raise NotInstalled(f"ONNX Runtime has no kernels on a CPU for this model: {reason}") from error

    def logits(ids: Tensor) -> Tensor:
        feeds = {"input_ids": ids.cpu().numpy(), "attention_mask": torch.ones_like(ids.cpu()).numpy()}
        return torch.from_numpy(session.run(["logits"], feeds)[0])

    return Consumer(name, logits)
