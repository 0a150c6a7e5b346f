"""Convolutions of one and two dimensions: with weights that are quantized as they are used, and packed ones.

A kernel `[out, in / groups, *size]` is quantized as the matrix `[out, in / groups * size]`. Activations are quantized
with their channels moved last, so that per_token means each pixel, and per_channel_-1 each channel.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat.kernels.linear import compute_dtype
from qat.nn.layer import LayerQuantizers, PackedLayer, QuantLayer
from qat.nn.packed import PackedTensor
from qat.nn.quantize_grad import quantize_grad
from qat.quantizers import NoQuantizer, Quantizer


class _PackedConv(PackedLayer):
    """y = output_quantizer(input_quantizer(x) * dequantize(weight) + b), for inference."""

    def __init__(self, conv: Any, weights: Mapping[str, PackedTensor], input: nn.Module, output: nn.Module) -> None:
        super().__init__(**_options(conv))
        del self.weight, self.bias
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self._adopt(weights, input, output)

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        axis = _channel_axis(conv)
        x = self.input_quantizer(input.movedim(axis, -1)).movedim(-1, axis)
        weight = conv.weight.dequantize(compute_dtype(x)).reshape(conv.out_channels, -1, *conv.kernel_size)
        y = conv._conv_forward(x, weight, conv.bias)
        return self.output_quantizer(y.movedim(axis, -1)).movedim(-1, axis)


class PackedConv1d(_PackedConv, nn.Conv1d):
    """The stored form of QuantConv1d; its values are the same bits."""

    kind = "conv1d"


class PackedConv2d(_PackedConv, nn.Conv2d):
    """The stored form of QuantConv2d; its values are the same bits."""

    kind = "conv2d"


class _QuantConv(QuantLayer):
    """y = output_quantizer(input_quantizer(x) * weight_quantizer(W) + b), for any stride, padding and groups."""

    weight_quantizer: Quantizer | NoQuantizer

    def __init__(self, conv: Any, quantizers: LayerQuantizers) -> None:
        super().__init__(**_options(conv))
        self.weight = conv.weight
        self.bias = conv.bias
        self._adopt(conv, quantizers)

    @staticmethod
    def as_matrix(module: Any, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @staticmethod
    def features(module: Any) -> tuple[int | None, int]:
        return module.in_channels, module.out_channels

    def forward(self, input: Tensor) -> Tensor:
        conv: Any = self
        axis = _channel_axis(conv)
        x = self.input_quantizer(input.movedim(axis, -1)).movedim(-1, axis)
        weight = self.weight_quantizer(conv.weight.flatten(1)).reshape_as(conv.weight)
        y = quantize_grad(conv._conv_forward(x, weight, conv.bias).movedim(axis, -1), self.grad_quantizer)
        return self.output_quantizer(y).movedim(-1, axis)

    def _plain(self, conv: Any) -> nn.Module:
        conv.weight, conv.bias = self.weight, self.bias
        return conv.train(self.training)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`nn.Conv1d` whose weight, input, output and gradient are quantized; takes over its Parameters."""

    stored = PackedConv1d

    def plain(self) -> nn.Module:
        return self._plain(nn.Conv1d(**_options(self)))


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`nn.Conv2d` whose weight, input, output and gradient are quantized; takes over its Parameters."""

    stored = PackedConv2d

    def plain(self) -> nn.Module:
        return self._plain(nn.Conv2d(**_options(self)))


def _channel_axis(conv: Any) -> int:
    """Counted from the end, because a batch dimension may be missing."""
    return -1 - len(conv.kernel_size)


def _options(conv: Any) -> dict[str, Any]:
    """What to build a convolution like this one with; its weight and bias are still to come."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "device": "meta"}
