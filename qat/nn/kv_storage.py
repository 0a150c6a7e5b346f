"""Storage of the keys, or the values, of one layer: bit-packed codes, and a tail in full precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.kernels import ops
from qat.kernels.attention_decode.cached import CachedTokens, takes
from qat.nn.growing import GrowingRows
from qat.nn.kv_quantizer import Schedule
from qat.numerics.packing import pack_rows, unpack_rows
from qat.numerics.qtensor import QParams

# Tokens for which there is room beyond those stored.
_ROOM = 256


class StoredTokens:
    """Tokens `[batch, heads, tokens, head_dim]`: those that the schedule quantizes as codes, the others as they are.

    Codes are packed token by token, `[batch, heads, tokens, ceil(width / 8) * bits]` bytes. Dynamic scales and zero
    points lie beside them in their storage types, one row for each token or group of tokens; static qparams are the
    quantizer's. All of them grow in place. `cached` hands them to attention that decodes them by itself; `append` and
    `seen` unpack and dequantize everything.

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
        self._rows: dict[str, GrowingRows] = {}
        self._constant: dict[str, Any] = {}

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.quantized + (0 if self.tail is None else self.tail.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and the full-precision tail, without the room to grow."""
        kept = [*(own.rows for own in self._rows.values()), *([] if self.tail is None else [self.tail])]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def append(self, new: Tensor) -> Tensor:
        """Add tokens. Returns all of them, quantized as far as they were before the call."""
        old = None if not self.quantized else self.dequantize()
        raw = self._unquantized_with(new)
        self._keep(raw.detach())
        return raw if old is None else torch.cat([old, raw], dim=-2)

    def add(self, new: Tensor) -> None:
        """Add tokens, through which no gradient passes."""
        self._keep(self._unquantized_with(new.detach()))

    def seen(self) -> Tensor:
        """All tokens as the last query sees them."""
        assert self.tail is not None
        return torch.cat([self.dequantize(), self.tail], dim=-2) if self.quantized else self.tail

    def cached(self) -> CachedTokens | None:
        """All tokens as attention decodes them; None where it cannot, or none is quantized yet."""
        if not self.quantized or self.tail is None:
            return None
        format, granularity = self.quantizer.format, self.quantizer.granularity
        scale, zero_point, codebook, offset = self._qparams()
        if not isinstance(scale, Tensor) or codebook is not None or offset is not None:
            return None
        if not takes(format, granularity, self._width):
            return None
        return CachedTokens(self._rows["codes"].rows, scale, zero_point, self.tail, format.name, str(granularity))

    def _unquantized_with(self, new: Tensor) -> Tensor:
        return new.clone() if self.tail is None else torch.cat([self.tail, new], dim=-2)

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
            if name not in self._rows:
                tokens = x.shape[-2] // row.shape[-2]
                self._rows[name] = GrowingRows(max(1, _ROOM // tokens))
            self._rows[name].append(row)
        self.quantized += x.shape[-2]

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The quantized tokens."""
        format, granularity = self.quantizer.format, self.quantizer.granularity
        return ops.dequantize(self.codes(), self._qparams(), format, granularity, self._dtype)

    def _qparams(self) -> QParams:
        return QParams(**self._constant, **{name: own.rows for name, own in self._rows.items() if name != "codes"})

    def codes(self) -> Tensor:
        """The codes of the quantized tokens, unpacked."""
        return unpack_rows(self._rows["codes"].rows, self.quantizer.format, self._width)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what `change`, which works on the first dimension, makes of it."""
        for own in self._rows.values():
            own.map_batch(change)
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
        for name, own in self._rows.items():
            own.crop(self.quantized if name == "codes" else rows)
