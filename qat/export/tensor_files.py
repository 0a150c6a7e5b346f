"""Safetensors files that are written and read tensor by tensor, so that memory holds one of them at a time.

The library writes a dictionary of all tensors at once, which for a converted model is a second copy of it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.errors import InputError

SHARD_BYTES = 5 * 10**9
WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_WIDTHS = {name: dtype.itemsize for dtype, name in _DTYPES.items()}
_ALIGNMENT = 8
# Formats of weights that run code when they are opened.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")

Named = Iterator[tuple[str, Tensor]]


def write_tensors(folder: Path, tensors: Callable[[], Named], shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index, as transformers names them.

    Args:
        folder: an existing folder.
        tensors: gives names and tensors, the same at each call. Called twice: for the sizes, which a file begins with,
            and for the numbers.
        shard_bytes: a tensor that is larger has a file of its own.

    Returns:
        The names of the files that hold tensors.

    Raises:
        InputError: if they cannot be written.
    """
    shards = _shards(tensors(), shard_bytes)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    given = tensors()
    try:
        for name, headers in zip(names, shards, strict=True):
            _write_file(folder / name, headers, given)
    except OSError as error:
        raise InputError(f"Cannot write {folder}: {error}. Free space, or choose another folder.") from error
    if count > 1:
        _write_index(folder / _INDEX, dict(zip(names, shards, strict=True)))
    return names


def _shards(tensors: Named, shard_bytes: int) -> list[dict[str, dict[str, Any]]]:
    """The header of every file: dtype, shape and place of each tensor."""
    shards: list[dict[str, dict[str, Any]]] = [{}]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        size += tensor.nbytes
        shards[-1][name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "bytes": tensor.nbytes}
    return [_placed(shard) for shard in shards]


def _placed(shard: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Wide dtypes first, as the library has them, so that every number lies at a multiple of its size."""
    placed, end = {}, 0
    for name in sorted(shard, key=lambda name: (-_WIDTHS[shard[name]["dtype"]], name)):
        size = shard[name].pop("bytes")
        placed[name] = shard[name] | {"data_offsets": [end, end + size]}
        end += size
    return placed


def _write_file(path: Path, headers: Mapping[str, Any], tensors: Named) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, **headers}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name, tensor in islice(tensors, len(headers)):
            file.seek(8 + len(header) + headers[name]["data_offsets"][0])
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            flat.view(torch.uint8).numpy().tofile(file)


def _write_index(path: Path, shards: Mapping[str, Mapping[str, Any]]) -> None:
    places = {name: file for file, headers in shards.items() for name in headers}
    size = sum(header["data_offsets"][1] - header["data_offsets"][0] for h in shards.values() for header in h.values())
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1) + "\n")


class TensorFiles:
    """The tensors of a checkpoint's folder by name, each read when it is asked for.

    Raises:
        InputError: where the folder holds no safetensors, a file is damaged or missing, or the index names a file
            outside of the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._places = self._index() if (self.folder / _INDEX).is_file() else self._single()

    def _single(self) -> dict[str, str]:
        if not (self.folder / WEIGHTS).is_file():
            pickles = [path.name for pattern in _PICKLES for path in self.folder.glob(pattern)]
            if pickles:
                raise InputError(
                    f"{self.folder} holds {pickles[0]}, a pickle, which can run code when it is opened: only "
                    "safetensors are read. Convert it by transformers where you trust it."
                )
            raise InputError(f"{self.folder} is no checkpoint: it has no {WEIGHTS}.")
        return dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)

    def _index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            places: dict[str, str] = json.loads(path.read_text())["weight_map"]
            outside = [name for name in places.values() if Path(name).name != name or not name.endswith(".safetensors")]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error!r}). Fetch or export the model again.") from error
        if outside:
            raise InputError(f"{path} names {outside[0]!r}, which is no safetensors file of its folder: refused.")
        for name, file in places.items():
            if name not in self._file(file).keys():  # noqa: SIM118 - a handle of safetensors, no dict
                raise InputError(f"{path} says that {file} holds {name}, and it does not. Fetch the model again.")
        return places

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self.folder / name} cannot be read: {error}. Fetch or export it again.") from error
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Raises:
            InputError: if there is none.
        """
        if name not in self._places:
            raise InputError(f"{self.folder} has no tensor {name}: it does not hold what its config.json says.")
        try:
            tensor: Tensor = self._file(self._places[name]).get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self.folder}: {name} cannot be read: {error}. Fetch or export it again.") from error
        return tensor

    def shape(self, name: str) -> list[int]:
        """The shape of the tensor `name`, without reading it."""
        found: list[int] = self._file(self._places[name]).get_slice(name).get_shape()
        return found
