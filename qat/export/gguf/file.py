"""A GGUF file: its metadata, and its tensors, each read when it is asked for.

The layout is that of `docs/gguf.md` of ggml: magic, version, counts, key-value pairs, descriptions of tensors, then
their data, each at a multiple of the alignment. Every length is checked against the file before it is believed, which
the reader of the package `gguf` does not do: a damaged count would keep it busy for years.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from qat.errors import InputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TYPES = {kind.value: kind for kind in GGMLQuantizationType}
_ALIGNMENT_KEY = "general.alignment"


class Entry(NamedTuple):
    """Where a tensor lies.

    Attributes:
        type: as the package `gguf` names it.
        shape: of its values, the last dimension being that which lies contiguous, as in PyTorch.
        start, size: its first byte in the file, and how many there are.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    size: int


class GgufFile:
    """A file in memory that the system maps, so that what was not asked for was not read.

    Attributes:
        metadata: the value of each key; of arrays only their lengths, which are those of vocabularies.
        entries: the tensors by name.

    Raises:
        InputError: if `path` is no GGUF file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"There is no file {path}.")
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
        if begin != _MAGIC:
            raise InputError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()}.")
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        try:
            self._read_header(_Cursor(self._data, len(_MAGIC)))
        except (_Damage, UnicodeDecodeError, struct.error) as error:
            raise InputError(f"{path} is damaged ({error}). Fetch or export it again.") from error

    def _read_header(self, cursor: "_Cursor") -> None:
        (version,) = cursor.numbers("I")
        if version not in _VERSIONS:
            raise InputError(f"{self.path} has version {version} of GGUF: versions {_VERSIONS} are read.")
        tensors, pairs = cursor.numbers("QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value()
        found = [self._describe(cursor) for _ in range(tensors)]
        alignment = self.metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damage(f"its alignment is {alignment}")
        base = -(-cursor.place // alignment) * alignment
        self.entries = {name: entry._replace(start=base + entry.start) for name, entry in found}
        if len(self.entries) < len(found):
            raise _Damage("it has tensors of the same name")
        for name, entry in self.entries.items():
            if entry.start + entry.size > len(self._data):
                raise _Damage(f"it ends before its tensor {name} does")

    def _describe(self, cursor: "_Cursor") -> tuple[str, Entry]:
        name = cursor.string()
        (dimensions,) = cursor.numbers("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Damage(f"its tensor {name} has {dimensions} dimensions")
        shape = cursor.numbers(f"{dimensions}Q")[::-1]
        kind, start = cursor.numbers("IQ")
        known = _TYPES.get(kind)
        if known is None:
            raise _Damage(f"its tensor {name} has the type {kind}, which this version of gguf does not know")
        elements, width = GGML_QUANT_SIZES[known]
        if shape[-1] % elements:
            raise _Damage(f"its tensor {name} has {shape[-1]} columns, which do not fill blocks of {known.name}")
        count = 1
        for size in shape:
            count *= size
        return name, Entry(known.name, shape, start, count // elements * width)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    def data(self, name: str) -> Tensor:
        """The bytes of the tensor `name`, uint8, in memory of their own."""
        entry = self.entries[name]
        return torch.from_numpy(np.array(self._data[entry.start : entry.start + entry.size]))


class _Damage(Exception):
    """What is wrong with a file."""


class _Cursor:
    """Reads a file from front to back; nothing beyond its end."""

    def __init__(self, data: np.ndarray, place: int) -> None:
        self._data = data
        self.place = place

    def _pass(self, size: int) -> slice:
        """The next `size` bytes, which are then behind."""
        if size > len(self._data) - self.place:
            raise _Damage("it ends within its header")
        self.place += size
        return slice(self.place - size, self.place)

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Little-endian numbers, spelled as in `struct`."""
        return struct.unpack("<" + kinds, self._data[self._pass(struct.calcsize("<" + kinds))].tobytes())

    def string(self) -> str:
        (size,) = self.numbers("Q")
        return self._data[self._pass(size)].tobytes().decode()

    def value(self) -> Any:
        """The value of a key; the length of an array."""
        (kind,) = self.numbers("I")
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        if kind != _ARRAY:
            raise _Damage(f"a value has the unknown type {kind}")
        kind, count = self.numbers("IQ")
        for size in self._sizes(kind, count):
            self._pass(size)
        return count

    def _sizes(self, kind: int, count: int) -> Iterator[int]:
        """Bytes to pass over for an array."""
        if kind in _NUMBERS:
            yield count * struct.calcsize("<" + _NUMBERS[kind])
        elif kind == _STRING:
            for _ in range(count):
                yield self.numbers("Q")[0]
        else:
            raise _Damage(f"an array has elements of the type {kind}")
