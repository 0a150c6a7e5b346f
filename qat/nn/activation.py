"""Stored activation quantization: the grid of a trained input or output quantizer, without the Quantizer."""

from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels import ops
from qat.nn.packed import dtype_name, dtype_named
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.qtensor import QParams, QuantizedTensor
from qat.quantizers import Quantizer
from qat.quantizers.keep_dtype import KeepsDtype


class StoredActivation(KeepsDtype):
    """Fake-quantizes x with stored qparams, or with a scale computed from x by a named rule.

    Args:
        description: format, granularity, rule (or None), scale_dtype, and the shape and dtype of each stored field.
            Buffers are allocated from it and filled by `load_state_dict`.
    """

    codebook: Tensor | None

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        self.description = description
        self.format = parse_format(description["format"])
        self.granularity = parse_granularity(description["granularity"])
        self.rule = description["rule"]
        self.scale_dtype = dtype_named(description["scale_dtype"])
        for name in QParams._fields:
            field = description.get(name)
            buffer = None if field is None else torch.empty(field["shape"], dtype=dtype_named(field["dtype"]))
            self.register_buffer(name, buffer)

    @classmethod
    @torch.no_grad()
    def from_quantizer(cls, quantizer: Quantizer) -> "StoredActivation":
        """Keep what `quantizer` computes for an activation.

        Raises:
            InputError: if its scales are quantized themselves, which is a storage format for weights.
        """
        qparams = quantizer.to_storage(quantizer.ready_qparams(torch.zeros(quantizer.shape)))
        if isinstance(qparams.scale, QuantizedTensor):
            raise InputError("Double quantization stores weights; for activations set double_quant=false.")
        kept = {name: value for name, value in qparams._asdict().items() if value is not None}
        if quantizer.rule is not None:
            kept = {name: value for name, value in kept.items() if name == "codebook"}
        description = {
            "format": quantizer.format.name,
            "granularity": str(quantizer.granularity),
            "rule": quantizer.rule,
            "scale_dtype": dtype_name(quantizer.scale_dtype),
        }
        fields = {name: {"shape": list(value.shape), "dtype": dtype_name(value.dtype)} for name, value in kept.items()}
        stored = cls(description | fields)
        for name, value in kept.items():
            getattr(stored, name).copy_(value)
        return stored

    def forward(self, x: Tensor) -> Tensor:
        if self.rule is None:
            return ops.fake_quantize(x, self.qparams(x), self.format, self.granularity)
        rule = self.rule, self.format, self.granularity, self.scale_dtype
        return ops.fake_quantize_dynamic(x, *rule, self.codebook)

    def qparams(self, x: Tensor) -> QParams:
        """The stored qparams, or those that the rule finds for `x`."""
        qparams = QParams(*(getattr(self, name) for name in QParams._fields))
        if self.rule is None:
            return qparams
        found = ops.dynamic_qparams(x, self.rule, self.format, self.granularity, self.scale_dtype)
        return found._replace(codebook=self.codebook)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> QuantizedTensor:
        """Quantize `x` for storage, as `Quantizer.quantize` does: `self(x)` equals what the codes stand for."""
        scale, zero_point, *others = qparams = self.qparams(x)
        assert isinstance(scale, Tensor)  # from_quantizer stores no other
        codes = ops.quantize(x, qparams, self.format, self.granularity)
        stored = QParams(
            scale.to(self.scale_dtype), None if zero_point is None else zero_point.to(torch.uint8), *others
        )
        return QuantizedTensor(codes, stored, self.format, self.granularity, x.dtype)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {self.granularity}, {self.rule or 'static'}"
