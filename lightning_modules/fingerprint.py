"""What tells models and texts apart: hashes of their bits, for files that must not be reused for others."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch import uint8 as byte
from torch.utils.data import Dataset

_WEIGHTS = (".safetensors", ".bin")
_LENGTH = 16  # hexadecimal digits, 64 bits
# Of a config: where it came from, and what does not change what the model computes.
_VOLATILE = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def of_model(model: nn.Module) -> str:
    """A hash of the tensors that `model` would save, name, dtype, shape and bits, and of its config; on any device."""
    config = model.config.to_diff_dict() if hasattr(model, "config") else {}
    kept = {name: value for name, value in config.items() if name not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(byte).cpu().numpy())
    return digest.hexdigest()[:_LENGTH]


def of_named_model(name: str) -> str:
    """A hash of a model in a folder, or the revision of one on the hub, without making the model.

    A name that leads to neither is returned as it is: loading will say what is wrong with it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return f"{name}@{_revision(name)}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name == "config.json" or file.suffix in _WEIGHTS:
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:_LENGTH]


def of_windows(windows: Dataset[dict[str, Tensor]]) -> str:
    """A hash of the tokens of all windows in their order."""
    digest = hashlib.sha256()
    for index in range(len(windows)):  # type: ignore[arg-type]
        digest.update(windows[index]["input_ids"].numpy())
    return digest.hexdigest()[:_LENGTH]


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what a description that was read differs from that of today, for messages; empty: in nothing."""
    changed = [name for name, value in now.items() if made.get(name) != value]
    return ", ".join(f"{name.replace('_', ' ')} {made.get(name)} (now {now[name]})" for name in changed)


def _revision(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)
    except (OSError, ValueError):
        return None
