"""GGUF, the file of llama.cpp and of what is built on it."""

from pathlib import Path

# Of the folder that is written.
FILE = "model.gguf"


def holds_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder with some and no other weights."""
    return path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")))
