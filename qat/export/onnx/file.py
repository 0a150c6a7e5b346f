"""The file `model.onnx` with its data, written tensor by tensor and read in the same way.

Beside the graph it says, under the key `qat`, the grid of every layer, so that reading it back needs no guesses.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError
from torch import Tensor

from qat.errors import InputError
from qat.export.onnx import DATA, MODEL
from qat.export.onnx.tensors import TORCH_DTYPES, to_torch

_KEY = "qat"
# Smaller tensors stand in the graph, where what infers shapes finds them.
_SMALL = 1024

Described = dict[str, dict[str, Any]]


def write_model(graph: ir.Model, folder: Path, layers: Described) -> None:
    """Write `graph` and what `layers` says, in JSON, of its quantized layers to an existing folder."""
    graph.metadata_props[_KEY] = json.dumps(layers, separators=(",", ":"))
    ir.save(graph, folder / MODEL, external_data=DATA, size_threshold_bytes=_SMALL)


class OnnxFile:
    """The tensors of `model.onnx` by name, each read when it is asked for.

    Attributes:
        folder: that holds it.
        layers: what the file says of its quantized layers.
        opset: of its operators.

    Raises:
        InputError: if there is no such file, it is damaged, or something else wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MODEL).is_file():
            raise InputError(f"{folder} holds no {MODEL}.")
        try:
            graph = ir.load(folder / MODEL)
        except (DecodeError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{folder / MODEL} is damaged ({_first_line(error)}). Export the run again.") from error
        self.layers = _described(folder, graph.metadata_props)
        self.opset = graph.opset_imports.get("", 0)
        self._values = graph.graph.initializers

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Tensor:
        """A tensor in full precision.

        Raises:
            InputError: as `stored`, and if it is none.
        """
        tensor = self.stored(name)
        if tensor.dtype not in TORCH_DTYPES:
            raise InputError(f"{name} is {tensor.dtype.name}, which no full-precision tensor is: {MODEL} is damaged.")
        return to_torch(tensor)

    def stored(self, name: str) -> ir.TensorProtocol:
        """The tensor `name` as ONNX has it.

        Raises:
            InputError: if there is none, or its bytes are not all where they should be.
        """
        tensor = self._values[name].const_value if name in self._values else None
        if tensor is None:
            raise InputError(
                f"{self.folder / MODEL} has no tensor {name}, which its config.json or itself says it has."
            )
        if isinstance(tensor, ir.ExternalTensor):
            self._check_place(name, tensor)
        return tensor

    def _check_place(self, name: str, tensor: ir.ExternalTensor) -> None:
        if str(tensor.location) != DATA:
            raise InputError(f"{name} lies in {str(tensor.location)!r}, not in {DATA}: refused.")
        path, first = self.folder / DATA, tensor.offset or 0
        size = path.stat().st_size if path.is_file() else 0
        if not 0 <= first <= size - tensor.nbytes or tensor.length not in (None, tensor.nbytes):
            raise InputError(f"{path} lacks the bytes of {name}: it is cut short. Export the run again.")


def _described(folder: Path, said: Mapping[str, str]) -> Described:
    if _KEY not in said:
        raise InputError(f"{folder / MODEL} was written by something else: it does not say which layers have codes.")
    try:
        layers: Described = json.loads(said[_KEY])
        complete = all({"weight", "input", "output"} <= set(layer) for layer in layers.values())
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / MODEL} is damaged ({error}). Export the run again.") from error
    if not complete:
        raise InputError(f"{folder / MODEL} is damaged: a layer is not described. Export the run again.")
    return layers


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
