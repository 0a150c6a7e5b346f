"""Writing a GGUF file tensor by tensor."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)  # it tells of every file that it writes

_KINDS = ((bool, GGUFValueType.BOOL), (int, GGUFValueType.UINT32), (float, GGUFValueType.FLOAT32))
FLOAT_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Planned(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        name: in the file.
        type: as `gguf.GGMLQuantizationType` calls it.
        shape: of its values.
        make: gives its bytes, any shape.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_file(path: Path, architecture: str, metadata: dict[str, Any], tensors: Iterable[Planned]) -> None:
    """Write `path`, holding one tensor in memory at a time.

    Args:
        path: a new file.
        architecture: as llama.cpp calls it.
        metadata: with full keys, beside that of the architecture.
        tensors: in the order of the file.
    """
    planned = list(tensors)
    writer = GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in planned:
            kind = GGMLQuantizationType[tensor.type]
            elements, width = GGML_QUANT_SIZES[kind]
            shape = (*tensor.shape[:-1], tensor.shape[-1] // elements * width)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(tensor.make().contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kind = next(kind for type_, kind in _KINDS if isinstance(value, type_))
        writer.add_key_value(key, value, kind)
