"""A quantizer whose qparams were found once and stay."""

from typing import Any

import torch
from torch import Tensor

from qat.numerics.qtensor import QParams, QuantizedTensor, ViewParams
from qat.quantizers.base import Quantizer
from qat.quantizers.keep_dtype import KeepsDtype


class FixedQuantizer(Quantizer):
    """Another quantizer's grid, with the qparams that it finds for one tensor held as buffers.

    Where scales follow from the extremes of x, changing x changes its grid. Methods that move weights on their grid
    (GPTQ, rounding by gradient) need one that stays, and `initialize` finds it anew when a transform asks for that.
    """

    def __init__(self, source: Quantizer, x: Tensor) -> None:
        super().__init__(source.shape, source.format, source.granularity)
        self.scale_dtype, self.codebook_dtype = source.scale_dtype, source.codebook_dtype
        self.source = source
        self.dense_gradient = source.dense_gradient
        self.set_mask(source.mask)
        source.set_mask(None)  # one of them is enough
        self.held = _Held(source.qparams(self.masked(x)))

    @property
    def holds_zero(self) -> bool:
        return self.source.holds_zero

    def qparams(self, x: Tensor) -> QParams:
        return self.held.qparams()

    def adopt(self, params: ViewParams) -> bool:
        return self.held.adopt(params)

    def initialize_from(self, view: Tensor) -> None:
        x = self.granularity.unview(view, self.shape)
        self.held.fill(self.source.qparams(x))


class _Held(KeepsDtype):
    """QParams as buffers; a scale that is quantized itself is one in turn, beside its codes."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self._nested: tuple[Any, ...] | None = None
        for name, value in qparams._asdict().items():
            if isinstance(value, QuantizedTensor):
                self._nested = (value.format, value.granularity, value.dtype)
                self.register_buffer("codes", value.codes)
                self.add_module(name, _Held(value.qparams))
            else:
                self.register_buffer(name, None if value is None else value.detach().clone())

    @torch.no_grad()
    def fill(self, qparams: QParams) -> None:
        for name, value in qparams._asdict().items():
            if isinstance(value, QuantizedTensor):
                self.get_buffer("codes").copy_(value.codes)
                getattr(self, name).fill(value.qparams)
            elif value is not None:
                getattr(self, name).copy_(value)

    def adopt(self, params: ViewParams) -> bool:
        """Take the scale and the zero point, unless the scale is quantized."""
        if self._nested is not None:
            return False
        for name in ("scale", "zero_point"):
            value = getattr(params, name)
            if value is not None:
                getattr(self, name).copy_(value.view_as(getattr(self, name)))
        return True

    def qparams(self) -> QParams:
        fields = {name: getattr(self, name) for name in QParams._fields}
        if self._nested is not None:
            fields["scale"] = QuantizedTensor(self.get_buffer("codes"), fields["scale"].qparams(), *self._nested)
        return QParams(**fields)
