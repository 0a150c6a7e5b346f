"""`QParams` and `QuantizedTensor`: the narrow waist of the project.

Everything above (training, calibration, adapters) produces a QuantizedTensor, everything below (kernels, packing,
export) consumes one. The meaning of the stored numbers is fixed here, once:

    x ~ (decode(codes) - zero_point) * scale + offset
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Union

import torch
from torch import Tensor

from qat.errors import InputError
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity


class ViewParams(NamedTuple):
    """QParams in float32 for the view `[groups, elements]`: `[groups, 1]` each, the codebook `[rows, entries]`."""

    scale: Tensor
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    offset: Tensor | None = None


class QParams(NamedTuple):
    """How codes relate to values. Every field is already rounded to what storage can hold.

    scale: positive, of `granularity.param_shape(x.shape)`; or itself a QuantizedTensor (NF4 double quantization).
    zero_point: integer-valued, shaped like scale; None is zero.
    codebook: `[..., entries]`, ascending along the last dimension, or `[..., entries * block]` for a vector codebook;
        leading dimensions are coarser than or equal to those of scale.
    offset: added at the end, one value or one per group; None is zero. Not trained.
    """

    scale: Union[Tensor, "QuantizedTensor"]
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    offset: Tensor | None = None

    def for_view(self) -> ViewParams:
        """Lay the parameters out for `granularity.view(x)`; a quantized scale is dequantized."""
        scale = self.scale.dequantize() if isinstance(self.scale, QuantizedTensor) else self.scale
        scale = scale.reshape(-1, 1).to(torch.float32)
        entries = 1 if self.codebook is None else self.codebook.shape[-1]
        return ViewParams(scale, _rows(self.zero_point, 1), _rows(self.codebook, entries), _rows(self.offset, 1))


def _rows(field: Tensor | None, width: int) -> Tensor | None:
    return None if field is None else field.reshape(-1, width).to(torch.float32)


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes and what they stand for.

    codes: int8 or uint8, not packed; shaped like the tensor, but that `format.block` elements of the last dimension
        share a code.
    dtype: what `dequantize` returns.
    """

    codes: Tensor
    qparams: QParams
    format: Format
    granularity: Granularity
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return elements_shape(self.codes.shape, self.format)

    def dequantize(self) -> Tensor:
        """The values, in `dtype`, computed in float32."""
        params = self.qparams.for_view()
        codes = self.granularity.of_codes(self.format.block).view(self.codes)
        values = self.format.decode(codes, params.codebook)
        return self.granularity.unview(unscale(values, params), self.shape).to(self.dtype)


def codes_shape(shape: Sequence[int], format: Format) -> torch.Size:
    """Shape of the codes of a tensor of `shape`.

    Raises:
        InputError: if codes that stand for several elements do not divide the last dimension.
    """
    *leading, last = shape
    if last % format.block:
        raise InputError(f"{format.name} has one code for {format.block} elements, which do not divide {last}.")
    return torch.Size((*leading, last // format.block))


def elements_shape(shape: Sequence[int], format: Format) -> torch.Size:
    """Shape of the tensor that codes of `shape` stand for."""
    *leading, last = shape
    return torch.Size((*leading, last * format.block))


def scale_down(view: Tensor, params: ViewParams, out: Tensor | None = None) -> Tensor:
    """v = (x - offset) / scale + zero_point in float32, for `view` `[groups, elements]`; in `out` if given."""
    x = view.to(torch.float32)
    if params.offset is not None:
        x = x - params.offset
    v = torch.div(x, params.scale, out=out)
    return v if params.zero_point is None else torch.add(v, params.zero_point, out=out)


def unscale(v_hat: Tensor, params: ViewParams, out: Tensor | None = None) -> Tensor:
    """x_hat = (v_hat - zero_point) * scale + offset, the inverse of `scale_down`; in `out` if given."""
    if params.zero_point is not None:
        v_hat = torch.sub(v_hat, params.zero_point, out=out)
    x_hat = torch.mul(v_hat, params.scale, out=out)
    return x_hat if params.offset is None else torch.add(x_hat, params.offset, out=out)
