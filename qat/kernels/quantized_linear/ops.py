"""The operator of packed linear layers, `qat::quantized_linear`, and its gradient to x."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.kernels import dispatch
from qat.kernels.dispatch import operator
from qat.kernels.quantized_linear import reference
from qat.kernels.quantized_linear.choice import choice
from qat.kernels.quantized_linear.launches import Choice, Ring, Skinny, Wide
from qat.kernels.quantized_linear.layout import Layout
from qat.kernels.quantized_linear.weight import TiledWeight

# A weight in tile order and its layout; a center of -1 says that zero points are stored.
_WEIGHT = (
    "Tensor tiles, Tensor scale, Tensor? zero, Tensor? table, Tensor? words, "
    "int rows, int columns, int bits, str kind, int center, int group"
)


def quantized_linear(x: Tensor, weight: TiledWeight, bias: Tensor | None = None) -> Tensor:
    """y = x @ dequantize(W)^T + bias, differentiable to x and bias.

    float32 sums, the same bits in every run. On a GPU kernels compute it for x in bfloat16 and float16; elsewhere, and
    in float32, a block of rows is dequantized after the other.

    Args:
        x: `[..., columns]`.
        weight: `[rows, columns]`.
        bias: `[rows]` or None.

    Returns:
        `[..., rows]` in the dtype of x.
    """
    layout = weight.layout
    words = weight.words_for(x.dtype) if takes(x) else None
    center = -1 if layout.center is None else layout.center
    fields = weight.tiles, weight.scale, weight.zero, weight.table, words
    own = None if bias is None else bias.to(x.dtype).contiguous()
    return _quantized_linear_of(x, own, *fields, *layout[:4], center, layout.group)


def takes(x: Tensor) -> bool:
    """Whether kernels multiply `x`."""
    return dispatch.has_hopper_kernels(x) and x.dtype in (torch.bfloat16, torch.float16)


def _quantized_linear(x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    weight, words = _weight(fields)
    rows = x.reshape(-1, weight.layout.columns)
    y = _product(rows, weight, words, bias)
    return y.view(*x.shape[:-1], weight.layout.rows)


def _product(x: Tensor, weight: TiledWeight, words: Tensor | None, bias: Tensor | None) -> Tensor:
    if not takes(x):
        return reference.quantized_linear(x, weight, bias)
    if not len(x):
        return x.new_empty((0, weight.layout.rows))
    return product_by(choice(weight, len(x), _gpu(x.device)), x, weight, words, bias)


def product_by(how: Choice, x: Tensor, weight: TiledWeight, words: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """y = x @ dequantize(W)^T + bias by one kernel, for x `[tokens, columns]` that `takes`."""
    # Triton is imported at its first use: `import qat` stays light.
    from qat.kernels.quantized_linear import streamed_product, tiled_product

    if isinstance(how, Skinny | Ring):
        return streamed_product.run(x, weight, words, bias, how)
    if isinstance(how, Wide):
        return tiled_product.run(x, weight, words, bias, how)
    return F.linear(x, tiled_product.dequantize(weight, words, x.dtype), bias)


@lru_cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _gradient(dy: Tensor, *fields: Any) -> Tensor:
    """dx = dy @ dequantize(W)."""
    weight, words = _weight(fields)
    rows = dy.reshape(-1, weight.layout.rows)
    if takes(dy):
        from qat.kernels.quantized_linear import tiled_product

        dx = rows @ tiled_product.dequantize(weight, words, dy.dtype)
    else:
        dx = reference.gradient(rows, weight)
    return dx.view(*dy.shape[:-1], weight.layout.columns)


def _weight(fields: tuple[Any, ...]) -> tuple[TiledWeight, Tensor | None]:
    tiles, scale, zero, table, words, rows, columns, bits, kind, center, group = fields
    layout = Layout(rows, columns, bits, kind, None if center < 0 else center, group)
    return TiledWeight(tiles, scale, zero, table, layout), words


def _fake(x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], fields[5]))


def _gradient_fake(dy: Tensor, *fields: Any) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], fields[6]))


_quantized_linear_of = operator(
    f"quantized_linear(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor", _quantized_linear, _fake
)
_gradient_of = operator(f"quantized_linear_gradient(Tensor dy, {_WEIGHT}) -> Tensor", _gradient, _gradient_fake)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *fields = inputs
    ctx.save_for_backward(*fields[:5])
    ctx.layout = fields[5:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_bias = ctx.needs_input_grad[:2]
    dx = _gradient_of(dy, *ctx.saved_tensors, *ctx.layout) if need_x else None
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None
    return dx, dbias, *[None] * 11


torch.library.register_autograd("qat::quantized_linear", _backward, setup_context=_save_for_backward)
