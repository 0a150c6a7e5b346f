"""A linear layer that multiplies codes, of its weight, its input and gradients, instead of what they stand for."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qat.kernels import ops, product_ops
from qat.kernels.linear import compute_dtype, masked
from qat.kernels.scaled_product.operand import Operand
from qat.numerics.formats import Format
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams

PRODUCTS = ("forward", "dgrad", "wgrad")


class Grid(NamedTuple):
    """How a weight or an input is quantized.

    clips: whether values beyond the grid get no gradient.
    """

    format: Format
    granularity: Granularity
    clips: bool


class GradGrid(NamedTuple):
    """How a gradient is quantized: symmetric scales from the extremes, of each row of what is multiplied or of all."""

    format: Format
    granularity: Granularity
    scale_dtype: torch.dtype
    stochastic: bool


class LowBit(NamedTuple):
    """What a layer multiplies, and which of the three products as codes.

    products: of PRODUCTS; `forward` is always one of them.
    """

    input: Grid
    weight: Grid
    grad: GradGrid | None
    products: tuple[str, ...]


def low_bit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantized_x: tuple[Tensor, QParams],
    quantized_weight: tuple[Tensor, QParams],
    how: LowBit,
    mask: Tensor | None = None,
    dense_gradient: bool = False,
) -> Tensor:
    """y = x_hat @ W_hat^T + bias, as (codes of x @ codes of W^T) * s_x * s_W + bias.

    What fake quantization computes, but that it rounds x_hat and W_hat to the dtype of x first. The backward pass, with
    the gradient g `[tokens, out]` and Q the quantizer of gradients:

        dgrad    dx_hat = g @ W_hat       as a product of codes    Q(g * s_W) @ codes of W
        wgrad    dW_hat = g^T @ x_hat     as a product of codes    Q((g * s_x)^T) @ codes of x

    The scale of the other operand varies along what is summed, so it goes into the gradient before that is quantized.
    Then weights and inputs are multiplied exactly, and the gradient is all that is rounded, once for each product. What
    is not a product of codes takes the gradient as it came. From dW_hat and dx_hat on, everything is as for
    `fake_quantize`. Kept for the backward pass: a byte a weight and a byte an input; x itself only where values beyond
    a static or learned grid have no gradient. (SwitchBack, arXiv 2304.13013; Jetfire, arXiv 2403.12422.)

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.
        quantized_x, quantized_weight: codes of x and of the weight, shaped like these, and their qparams.
        mask, dense_gradient: as for `fake_quantized_linear`; the codes are those of the masked weight.

    Returns:
        y `[..., out]`, in the dtype of x, or of autocast where that is on.
    """
    (x_codes, x_qparams), (w_codes, w_qparams) = quantized_x, quantized_weight
    scales, codes = (x_qparams.for_view().scale, w_qparams.for_view().scale), (x_codes, w_codes)
    bias = None if bias is None else bias.to(compute_dtype(x))
    return _LowBitLinear.apply(x, weight, bias, *scales, *codes, mask, how, compute_dtype(x), dense_gradient)


class _LowBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_scale: Tensor,
        w_scale: Tensor,
        x_codes: Tensor,
        w_codes: Tensor,
        mask: Tensor | None,
        how: LowBit,
        dtype: torch.dtype,
        dense_gradient: bool,
    ) -> Tensor:
        x_codes = x_codes.reshape(-1, x.shape[-1])
        ctx.how, ctx.dtype, ctx.dense_gradient = how, x.dtype, dense_gradient
        kept = x if _clips(how.input) else None
        ctx.save_for_backward(kept, weight, mask, x_scale, w_scale, x_codes, w_codes)
        a, b = Operand(x_codes, x_scale, how.input.format), Operand(w_codes, w_scale, how.weight.format)
        y = product_ops.scaled_product(a, b, dtype)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, x_scale, w_scale, x_codes, w_codes = ctx.saved_tensors
        need_x, need_weight, need_bias, need_x_scale, need_w_scale, *_ = ctx.needs_input_grad
        g, how = dy.reshape(-1, dy.shape[-1]), ctx.how
        dx = dx_scale = dweight = dw_scale = None
        needs_x, needs_weight = (need_x, need_x_scale), (need_weight, need_w_scale)
        along_rows, along_columns = _gradient_operands(g, w_scale, x_scale, how, any(needs_x), any(needs_weight))
        if any(needs_x):
            dx_hat = _dgrad(g, along_rows, w_codes, w_scale, how).reshape(*dy.shape[:-1], weight.shape[1])
            dx, dx_scale = _to_operand(dx_hat, x, None, x_scale, needs_x, how.input)
            dx = None if dx is None else dx.to(ctx.dtype)
        if any(needs_weight):
            dw_hat = _wgrad(g, along_columns, x_codes, x_scale, how)
            dweight, dw_scale = _to_operand(dw_hat, masked(weight, mask), w_codes, w_scale, needs_weight, how.weight)
        if dweight is not None and not ctx.dense_gradient:
            dweight = masked(dweight, mask)
        dbias = g.sum(0) if need_bias else None
        return dx, dweight, dbias, dx_scale, dw_scale, None, None, None, None, None, None


def _clips(grid: Grid) -> bool:
    return grid.clips and grid.format.saturates


def _gradient_operands(
    g: Tensor, w_scale: Tensor, x_scale: Tensor, how: LowBit, need_x: bool, need_weight: bool
) -> tuple[Operand | None, Operand | None]:
    """g * s_W along its rows for dgrad and (g * s_x)^T for wgrad, as codes; None where the product takes none."""
    dgrad, wgrad = need_x and "dgrad" in how.products, need_weight and "wgrad" in how.products
    if how.grad is None or not (dgrad or wgrad):
        return None, None
    across, down = w_scale.reshape(1, -1) if dgrad else None, x_scale if wgrad else None
    found, format = product_ops.gradient_codes(g, across, down, *how.grad), how.grad.format
    along_rows = Operand(found.row_codes, found.row_scale, format) if dgrad else None
    return along_rows, Operand(found.column_codes, found.column_scale, format) if wgrad else None


def _dgrad(g: Tensor, gradient: Operand | None, w_codes: Tensor, w_scale: Tensor, how: LowBit) -> Tensor:
    """dx_hat `[tokens, in]`; of `gradient`, if there are codes."""
    if gradient is None:
        return g @ _values(w_codes, w_scale, how.weight, g.dtype)
    other = Operand(product_ops.transposed_codes(w_codes), None, how.weight.format)
    return product_ops.scaled_product(gradient, other, g.dtype)


def _wgrad(g: Tensor, gradient: Operand | None, x_codes: Tensor, x_scale: Tensor, how: LowBit) -> Tensor:
    """dW_hat `[out, in]`; of `gradient`, if there are codes."""
    if gradient is None:
        return g.T @ _values(x_codes, x_scale, how.input, g.dtype)
    other = Operand(product_ops.transposed_codes(x_codes), None, how.input.format)
    return product_ops.scaled_product(gradient, other, g.dtype)


def _values(codes: Tensor, scale: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """What `codes` `[rows, k]` stand for, in `dtype`."""
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    ops.dequantize_view_(codes.view(len(scale), -1), values.view(len(scale), -1), scale, None, None, grid.format.name)
    return values


def _to_operand(
    grad: Tensor, x: Tensor | None, codes: Tensor | None, scale: Tensor, needs: tuple[bool, bool], grid: Grid
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and to its scale from that of x_hat, which is overwritten."""
    if x is None:
        return grad, None
    view = grid.granularity.view
    params, wanted = (scale, None, None, grid.format.name), (*needs, False, False)
    own_codes = None if codes is None else view(codes)
    dx, dscale, *_ = ops.gradients_(view(grad), view(x), own_codes, None, wanted, *params, clip=_clips(grid))
    return None if dx is None else grid.granularity.unview(dx, grad.shape), dscale
