"""The stored form of a tensor: packed codes and qparams as buffers, and no Quantizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels import ops
from qat.kernels.quantized_linear import weight as tile_order
from qat.kernels.quantized_linear.tiles import TILE_ROWS
from qat.kernels.quantized_linear.weight import TiledWeight
from qat.numerics.formats import parse_format
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken, parse_granularity
from qat.numerics.packing import pack, packed_bytes, unpack
from qat.numerics.qtensor import QParams, QuantizedTensor, codes_shape
from qat.quantizers.keep_dtype import KeepsDtype

# QParams fields in the order in which they are described, stored and loaded.
_FIELDS = QParams._fields


class PackedTensor(KeepsDtype):
    """A QuantizedTensor as buffers: bit-packed `codes`, and one buffer for each of its qparams.

    A scale that is quantized itself is a PackedTensor in turn, so its codes are stored under `scale.codes`. Casting the
    model changes the dtype that a weight is dequantized to, as it would change the weight, and no stored number.

    Codes are stored row by row, as artifacts have them. What multiplies by the tensor on a GPU asks for `tiled`, which
    puts them into the order of its kernels, once, and keeps no others. Casts and moves between devices bring the
    artifact's order back; state dicts have it always.

    Args:
        description: what `describe` returns; the buffers are allocated from it and filled by `load_state_dict`.
    """

    codes: Tensor

    def __init__(self, description: dict[str, Any], device: torch.device | None = None) -> None:
        super().__init__()
        self.description = description
        self.format = parse_format(description["format"])
        self.granularity = parse_granularity(description["granularity"])
        self.shape = torch.Size(description["shape"])
        self.dtype = dtype_named(description["dtype"])
        self._tiled: TiledWeight | None = None
        self._tiles_refused = False
        size = packed_bytes(codes_shape(self.shape, self.format).numel(), self.format.bits)
        self.register_buffer("codes", torch.empty(size, dtype=torch.uint8, device=device))
        for name in _FIELDS:
            field = description.get(name)
            if field is None:
                continue
            if "format" in field:
                self.add_module(name, PackedTensor(field, device))
            else:
                buffer = torch.empty(field["shape"], dtype=dtype_named(field["dtype"]), device=device)
                self.register_buffer(name, buffer)

    @classmethod
    def from_quantized(cls, q: QuantizedTensor) -> "PackedTensor":
        """Pack `q`."""
        packed = cls(describe(q), q.codes.device)
        packed.codes.copy_(pack(q.codes, q.format))
        for name, value in zip(_FIELDS, q.qparams, strict=True):
            if isinstance(value, QuantizedTensor):
                setattr(packed, name, cls.from_quantized(value))
            elif value is not None:
                getattr(packed, name).copy_(value)
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedTensor":
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        if self._tiled is not None and fn(here) is here:
            return self  # it moves and casts nothing
        self.to_rows()
        super()._apply(fn, recurse)
        self._set_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype)
        for scale in self.children():
            assert isinstance(scale, PackedTensor)
            scale._set_dtype(torch.float32)
        return self

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.description = self.description | {"dtype": dtype_name(dtype)}

    @property
    def device(self) -> torch.device:
        """Where it lies; models of transformers ask the weight of an embedding."""
        return self.codes.device

    @property
    def memory(self) -> int:
        """What tells tensors apart that share no memory: the address of their codes."""
        return (self.codes if self._tiled is None else self._tiled.tiles).data_ptr()

    def tiled(self) -> TiledWeight | None:
        """The tensor in tile order; None where no kernel takes it. Converted by blocks, at the first call."""
        if self._tiled is None and not self._tiles_refused:
            grid = self._qparams(), self.format, self.granularity
            with torch.inference_mode(False):  # whose tensors no training could use afterwards
                self._tiled = tile_order.tiled_by_rows(self.shape, *grid, self._codes_of_rows)
            self._tiles_refused = self._tiled is None
            if self._tiled is not None:
                self.codes = self.codes.new_empty(0)
                if self.dtype != torch.float32:
                    self._tiled.words_for(self.dtype)
        return self._tiled

    def kernel_tensors(self) -> list[Tensor]:
        """What kernels read in the place of `codes`, beside the buffers: none where codes lie row by row."""
        return [] if self._tiled is None else self._tiled.tensors()

    def to_rows(self) -> None:
        """Put codes back into the order of artifacts."""
        if self._tiled is not None:
            self.codes = tile_order.pack_rows(self._tiled, self.format)
            self._tiled = None
        self._tiles_refused = False

    def _codes_of_rows(self, first: int, last: int) -> Tensor:
        """Codes of rows; `first` is a multiple of eight, so they begin with a byte."""
        columns, bits = self.shape[1], self.format.bits
        own = self.codes[first * columns // 8 * bits : packed_bytes(last * columns, bits)]
        return unpack(own, self.format, (last - first, columns))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._tiled is not None:  # which stays: a recorded graph may read it
            destination[f"{prefix}codes"] = tile_order.pack_rows(self._tiled, self.format)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.to_rows()
        super()._load_from_state_dict(*arguments, **options)

    def quantized(self) -> QuantizedTensor:
        """The QuantizedTensor, codes unpacked."""
        if self._tiled is None:
            codes = unpack(self.codes, self.format, codes_shape(self.shape, self.format))
        else:
            codes = tile_order.codes_of(self._tiled, self.format)
        return QuantizedTensor(codes, self._qparams(), self.format, self.granularity, self.dtype)

    def without_codes(self) -> QuantizedTensor:
        """The QuantizedTensor with its qparams, its codes on the meta device: what tells the grid."""
        codes = torch.empty(codes_shape(self.shape, self.format), dtype=self.format.code_dtype, device="meta")
        return QuantizedTensor(codes, self._qparams(), self.format, self.granularity, self.dtype)

    def _qparams(self) -> QParams:
        """The qparams; those that are quantized themselves, unpacked."""
        fields: list[Any] = [getattr(self, name, None) for name in _FIELDS]
        resolved: list[Any] = [f.quantized() if isinstance(f, PackedTensor) else f for f in fields]
        return QParams(*resolved)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in `dtype` or the dtype of the tensor that was quantized."""
        q = self.quantized()
        return ops.dequantize(q.codes, q.qparams, q.format, q.granularity, dtype or self.dtype)

    @property
    def rows_are_separate(self) -> bool:
        """Whether no group and no byte of codes crosses the borders of rows."""
        count, columns = codes_shape(self.shape, self.format)
        whole_bytes = self._tiled is not None or len(self.codes) == count * packed_bytes(columns, self.format.bits)
        return whole_bytes and isinstance(self.granularity, PerTensor | PerChannel | PerToken | PerGroup)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values of `rows` `[n]` of a matrix, `[n, columns]`: the same bits as `dequantize()[rows]`.

        Only those rows are unpacked, unless groups or bytes of codes cross the borders of rows.
        """
        if not self.rows_are_separate or not len(rows):
            return self.dequantize(dtype).index_select(0, rows)
        columns = codes_shape(self.shape, self.format)[-1]
        if self._tiled is None:
            packed = self.codes.view(self.shape[0], -1).index_select(0, rows)
            codes = unpack(packed.view(-1), self.format, (len(rows), columns))
        else:
            codes = self._tiled_rows(self._tiled, rows)
        qparams = QParams(*(self._field_of_rows(name, rows) for name in _FIELDS))  # type: ignore[arg-type]
        return ops.dequantize(codes, qparams, self.format, self.granularity, dtype or self.dtype)

    def _tiled_rows(self, weight: TiledWeight, rows: Tensor) -> Tensor:
        """Codes of `rows`, from the rows of tiles that hold them."""
        layout = weight.layout._replace(rows=len(rows) * TILE_ROWS)
        own = replace(weight, tiles=weight.tiles.index_select(0, rows // TILE_ROWS), layout=layout)
        tall = tile_order.codes_of(own, self.format).view(len(rows), TILE_ROWS, -1)
        return tall[torch.arange(len(rows), device=rows.device), rows % TILE_ROWS]

    def _field_of_rows(self, name: str, rows: Tensor) -> Tensor | None:
        """The qparams of `rows`, for a field that has some for each row; else all of it."""
        field = getattr(self, name, None)
        values = field.quantized().dequantize() if isinstance(field, PackedTensor) else field
        return values if values is None or len(values) != self.shape[0] else values.index_select(0, rows)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.format.name}, {self.granularity}"


def describe(q: QuantizedTensor) -> dict[str, Any]:
    """Everything but the numbers: what an artifact's JSON says of `q`, and what `PackedTensor` is built from."""
    description: dict[str, Any] = {
        "format": q.format.name,
        "granularity": str(q.granularity),
        "shape": list(q.shape),
        "dtype": dtype_name(q.dtype),
    }
    for name, value in zip(_FIELDS, q.qparams, strict=True):
        if isinstance(value, QuantizedTensor):
            description[name] = describe(value)
        elif value is not None:
            description[name] = {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}
    return description


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as artifacts spell it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that artifacts spell `name`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"'{name}' is not a dtype of torch.")
    return dtype
