"""Rotary positions in the metadata of GGUF, and the factors of Llama 3, which are a tensor there."""

from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.gguf.file import GgufFile

FACTORS = "rope_freqs.weight"
_BASE = 10000.0


def rope_metadata(config: Any) -> dict[str, Any]:
    """What the metadata say of the rotation.

    Raises:
        InputError: if llama.cpp would rotate otherwise, or is not known to do the same.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"GGUF is written of rotary positions default, linear and llama3, not {kind}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("GGUF is written of models that rotate whole heads.")
    said: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return said


def rope_of(said: dict[str, Any], file: GgufFile) -> dict[str, Any]:
    """`rope_parameters` of a file without `config.json`; `said` are its metadata without their prefix.

    Raises:
        InputError: if they do not tell everything.
    """
    rope = {"rope_type": "default", "rope_theta": said.get("rope.freq_base", _BASE)}
    kind = said.get("rope.scaling.type", "none")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": said["rope.scaling.factor"]}
    if kind != "none" or FACTORS in file.entries:
        raise InputError(f"{file.path} scales its rotary positions by {kind if kind != 'none' else FACTORS}, of which "
                         "its metadata say too little: put the model's config.json beside it.")  # fmt: skip
    return rope


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each frequency by, float32 `[head_dim / 2]`; None where it is nothing.

    Llama 3 leaves high frequencies, divides low ones by `factor`, and passes from one to the other in between.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    dimensions = config.head_dim
    frequency = rope["rope_theta"] ** -(torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / rope["factor"] + share)
