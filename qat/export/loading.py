"""Open whatever a folder holds: an artifact, or a checkpoint or GGUF file that this or another tool quantized."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qat.errors import InputError, nearest
from qat.export import artifact
from qat.export.checkpoint import Checkpoint
from qat.export.gguf import holds_gguf
from qat.export.layouts import LAYOUTS
from qat.export.native import Native
from qat.export.onnx import MODEL
from qat.export.onnx.target import Onnx
from qat.export.targets import Target


def load(
    folder: str | Path, model: nn.Module | None = None, trust_remote_code: bool = False, bits: int | None = None
) -> nn.Module:
    """Read a quantized model: what `save` or an export wrote, or a checkpoint of another tool in one of those layouts.

    Args:
        folder: of the model; or a GGUF file.
        model: for an artifact, the unquantized architecture to fill, its weights being ignored. Default: built from
            `config.json` by transformers.
        trust_remote_code: run model code that `config.json` names.
        bits: of an artifact with nested codes, only the first so many of each are kept; None: all.

    Returns:
        The model in evaluation mode, its quantized layers being packed.

    Raises:
        InputError: if the folder holds no quantized model, is damaged or does not fit its architecture, or if an option
            is for artifacts and it is none.
    """
    target = target_of(folder)
    if target is None:
        artifact.check_artifact(folder)
        raise InputError(f"{folder} holds a model in full precision: quantize it by model=hf model.name={folder}")
    if not isinstance(target, Native) and (model is not None or bits is not None):
        raise InputError(f"An architecture and bits are for artifacts, and {folder} is {target.title}.")
    with _damaged(folder):
        if isinstance(target, Native):
            return artifact.load(folder, model, trust_remote_code, bits)
        return target.read(folder, trust_remote_code)


@contextmanager
def _damaged(folder: str | Path) -> Iterator[None]:
    """Whatever a file that nobody checked makes readers and transformers stumble over is one clear error."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise InputError(f"{folder} cannot be read ({reason}). It is damaged: fetch or export it again.") from error


def target_of(folder: str | Path) -> Target | None:
    """The target that would have written `folder`; None if it holds nothing quantized.

    Raises:
        InputError: if it is quantized in a way that is not known here.
    """
    folder = Path(folder)
    if (folder / artifact.CONFIG).is_file():  # whose model may have no config.json
        return Native()
    if holds_gguf(folder):
        from qat.export.gguf.target import Gguf  # whose package takes half a second to import

        return Gguf()
    if (folder / MODEL).is_file():
        return Onnx()
    config = _quantization_config(folder / "config.json")
    if config is None:
        return None
    method = config["quant_method"]
    if method == artifact.METHOD:
        return Native()
    for layout in LAYOUTS:
        if layout.wrote(config):
            return Checkpoint(layout())
    known = list(dict.fromkeys(layout.method for layout in LAYOUTS))
    raise InputError(
        f"{folder} is quantized by '{method}', which is not known here.{nearest(str(method), known)} Known are "
        f"{', '.join(known)}."
    )


def _quantization_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] | None = json.loads(path.read_text()).get("quantization_config")
        if found is not None:
            found["quant_method"]
        return found
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}). Fetch or export the model again.") from error
