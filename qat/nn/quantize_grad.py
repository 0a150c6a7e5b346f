"""Quantized gradients in compute: what a layer's backward pass receives is rounded before it is multiplied."""

from typing import Any

import torch
from torch import Tensor, nn

from qat.quantizers import NoQuantizer


def quantize_grad(y: Tensor, grad_quantizer: nn.Module) -> Tensor:
    """Return `y` unchanged; the gradient that comes back becomes `grad_quantizer(dL/dy)`.

    Placed behind y = x W^T, both products of the backward pass see the quantized gradient g_hat:
    dgrad dL/dx = g_hat W and wgrad dL/dW = g_hat^T x. With stochastic rounding E[g_hat] = dL/dy, so the gradient of
    the weight stays unbiased ("A Statistical Framework for Low-bitwidth Training", arXiv 2010.14298).

    Args:
        y: `[..., out]`, the output of a layer.
        grad_quantizer: a dynamic quantizer of tensors shaped like `y`.

    Returns:
        y, with another backward pass.
    """
    return y if isinstance(grad_quantizer, NoQuantizer) else _QuantizeGrad.apply(y, grad_quantizer)


class _QuantizeGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, grad_quantizer: nn.Module) -> Tensor:
        ctx.grad_quantizer = grad_quantizer
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_quantizer(dy), None
