"""A linear layer with a fake-quantized weight that keeps codes, not a second weight, for its backward pass."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qat.kernels import ops
from qat.numerics import functional
from qat.numerics.formats import Format, IntFormat, LevelFormat
from qat.numerics.granularity import Granularity
from qat.numerics.qtensor import QParams
from qat.numerics.ste import straight_through
from qat.scratch import scratch

_fuses = False


def fake_quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    qparams: QParams,
    format: Format,
    granularity: Granularity,
    clip: bool = True,
    mask: Tensor | None = None,
    dense_gradient: bool = False,
    codes: Tensor | None = None,
) -> Tensor:
    """y = x @ fake_quantize(weight * mask)^T + bias.

    The same bits as `F.linear(x, fake_quantize(weight), bias)`, but autograd holds no fake-quantized weight: on a CPU
    one byte a weight, the codes, found once for both passes; on a GPU nothing, because there they are found faster
    than read.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.
        clip: whether weights beyond the grid get no gradient; where they set the scale themselves, they need it.
        mask: `[out, in]`, false where the weight is pruned; None keeps all.
        dense_gradient: whether pruned weights get their gradient all the same.
        codes: of the view of the weight, where they were found before.

    Returns:
        y `[..., out]`, in the dtype of x, or of autocast where that is on.
    """
    dtype = compute_dtype(x)
    if dtype != x.dtype:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    compiled = _fuses and torch.compiler.is_compiling()
    if compiled and x.device.type == "cpu" and isinstance(format, IntFormat | LevelFormat):
        w = _kept(weight, mask, dense_gradient).to(torch.float32)
        return F.linear(x, _plain(w, qparams, format, granularity, clip).to(dtype), bias)
    grid = ops.grid_of(qparams, format, math.prod(granularity.param_shape(weight.shape)))
    return _FakeQuantizedLinear.apply(
        x, weight, bias, mask, codes, granularity, (clip and format.saturates, dense_gradient), *grid
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `x`: its own, or that of autocast, which leaves float64 alone."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


@contextmanager
def fused_by_a_compiler() -> Iterator[None]:
    """Fake-quantize the weights of linear layers by plain operators where a C++ compiler makes one loop of them.

    That is a uniform grid on a CPU, in a model that torch.compile traces for inductor: it finds W_hat again in the
    backward pass by itself. Values are the same; gradients of scales are summed in another order.
    """
    global _fuses
    before, _fuses = _fuses, True
    try:
        yield
    finally:
        _fuses = before


def _plain(weight: Tensor, qparams: QParams, format: Format, granularity: Granularity, clip: bool) -> Tensor:
    if clip:
        return functional.fake_quantize(weight, qparams, format, granularity)
    return straight_through(weight, functional.fake_quantize(weight.detach(), qparams, format, granularity))


class _FakeQuantizedLinear(torch.autograd.Function):
    """dx = dy @ W_hat; dW_hat = dy^T @ x, then dW and the gradients of the qparams as for `fake_quantize`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        codes: Tensor | None,
        granularity: Granularity,
        options: tuple[bool, bool],
        *grid: Any,
    ) -> Tensor:
        w_hat, codes = ops.fake_quantize_to_keep(granularity.view(masked(weight, mask)), codes, x.dtype, *grid)
        *params, ctx.format = grid
        ctx.granularity, (ctx.clip, ctx.dense_gradient) = granularity, options
        ctx.save_for_backward(x, weight, mask, codes, *params)
        return F.linear(x, granularity.unview(w_hat, weight.shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, codes, *params = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _, _, _, *need_params, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dbias = rows.sum(0) if need_bias else None
        view, grid = ctx.granularity.view, (*params, ctx.format)
        own = view(masked(weight, mask))
        w_hat = scratch("weight", own.shape, dy.dtype, own.device) if need_x else None
        found: tuple[Tensor | None, ...] = (None,) * 4
        if need_weight or any(need_params):
            dw_hat = rows.T @ x.reshape(-1, x.shape[-1])
            needs = (need_weight, *need_params)
            found = ops.gradients_(view(dw_hat), own, codes, w_hat, needs, *grid, clip=ctx.clip)
        elif w_hat is not None:
            ops.restore_view_(own, codes, w_hat, *grid)
        dx = None if w_hat is None else dy @ ctx.granularity.unview(w_hat, weight.shape)
        dweight = None if found[0] is None else ctx.granularity.unview(found[0], weight.shape)
        if dweight is not None and not ctx.dense_gradient:
            dweight = masked(dweight, mask)
        return dx, dweight, dbias, None, None, None, None, *found[1:], None


def _kept(weight: Tensor, mask: Tensor | None, dense_gradient: bool) -> Tensor:
    """`weight`, zero where it is pruned, differentiable."""
    kept = masked(weight, mask)
    return straight_through(weight, kept.detach()) if mask is not None and dense_gradient else kept


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """`weight`, zero where it is pruned."""
    if mask is None:
        return weight
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
