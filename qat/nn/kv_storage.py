"""Storage of the keys, or the values, of one layer: bit-packed codes, and a tail in full precision."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.kernels import ops
from qat.nn.kv_quantizer import Schedule
from qat.numerics.formats import Format
from qat.numerics.packing import pack, unpack
from qat.numerics.qtensor import QParams


class StoredTokens:
    """Tokens `[batch, heads, tokens, head_dim]`: those that the schedule quantizes as codes, the others as they are.

    Codes are packed token by token, `[batch, heads, tokens, ceil(width / 8) * bits]` bytes. Dynamic scales and zero
    points lie beside them in their storage types, one row for each token or group of tokens; static qparams are the
    quantizer's. Every append concatenates, and every read unpacks and dequantizes everything: the memory is that of the
    codes, the time is not that of a fused kernel.

    Args:
        quantizer: a Quantizer or StoredActivation, or `nn.Identity`.
        schedule: from when on a token is quantized.
    """

    def __init__(self, quantizer: nn.Module, schedule: Schedule) -> None:
        self.quantizer: Any = quantizer
        self.schedule = schedule
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.quantized = 0
        self.tail: Tensor | None = None
        self._rows: dict[str, Tensor] = {}
        self._constant: dict[str, Any] = {}

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.quantized + (0 if self.tail is None else self.tail.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and the full-precision tail."""
        kept = [*self._rows.values(), *([] if self.tail is None else [self.tail])]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def append(self, new: Tensor) -> Tensor:
        """Add tokens. Returns all of them, quantized as far as they were before the call."""
        old = None if not self.quantized else self.dequantize()
        raw = new.clone() if self.tail is None else torch.cat([self.tail, new], dim=-2)
        self._keep(raw.detach())
        return raw if old is None else torch.cat([old, raw], dim=-2)

    @torch.no_grad()
    def _keep(self, raw: Tensor) -> None:
        """Quantize what is due of the tokens that are still in full precision, and keep the others."""
        self._dtype, self._width = raw.dtype, raw.shape[-1]
        due = self.schedule.quantized_until(self.quantized + raw.shape[-2]) - self.quantized
        if due:
            self._quantize(raw[..., :due, :])
        # A slice would keep all of `raw` in memory.
        self.tail = raw[..., due:, :].clone() if due else raw

    def _quantize(self, x: Tensor) -> None:
        q = self.quantizer.quantize(x)
        fields = {name: field for name, field in q.qparams._asdict().items() if field is not None}
        growing = () if self.quantizer.rule is None else ("scale", "zero_point")
        self._constant = {name: field for name, field in fields.items() if name not in growing}
        rows = {"codes": pack_rows(q.codes, q.format)} | {name: fields[name] for name in growing if name in fields}
        for name, row in rows.items():
            self._rows[name] = torch.cat([self._rows[name], row], dim=-2) if self.quantized else row
        self.quantized += x.shape[-2]

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The quantized tokens."""
        qparams = QParams(**self._constant, **{name: row for name, row in self._rows.items() if name != "codes"})
        format, granularity = self.quantizer.format, self.quantizer.granularity
        return ops.dequantize(self.codes(), qparams, format, granularity, self._dtype)

    def codes(self) -> Tensor:
        """The codes of the quantized tokens, unpacked."""
        return unpack_rows(self._rows["codes"], self.quantizer.format, self._width)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what `change`, which works on the first dimension, makes of it."""
        self._rows = {name: change(row) for name, row in self._rows.items()}
        self.tail = None if self.tail is None else change(self.tail)

    def check_crop(self, length: int) -> None:
        """Refuse a `length` at which tokens would be in full precision whose full precision is gone.

        Raises:
            InputError: if so.
        """
        due = self.schedule.quantized_until(length)
        if due < min(length, self.quantized):
            raise InputError(
                f"The cache cannot be cropped to {length} tokens: the last {length - due} of them would have to be in "
                "full precision, which is gone. Use a per_token or per_group_N layout with window 0, or start anew."
            )

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if self.tail is None:
            return
        self.tail = self.tail[..., : max(0, length - self.quantized), :].clone()
        self.quantized = min(length, self.quantized)
        rows = self.quantized // max(1, self.schedule.group)
        ends = {name: self.quantized if name == "codes" else rows for name in self._rows}
        self._rows = {name: row[..., : ends[name], :].clone() for name, row in self._rows.items()}


def pack_rows(codes: Tensor, format: Format) -> Tensor:
    """Pack each row of `codes` `[..., width]` to whole bytes: `[..., ceil(width / 8) * bits]`, uint8."""
    padded = F.pad(codes, (0, -codes.shape[-1] % 8), value=format.code_range[0])
    return pack(padded, format).view(*codes.shape[:-1], -1)


def unpack_rows(packed: Tensor, format: Format, width: int) -> Tensor:
    """Undo `pack_rows` for rows of `width` codes."""
    padded = (*packed.shape[:-1], math.ceil(width / 8) * 8)
    return unpack(packed.reshape(-1), format, padded)[..., :width]
