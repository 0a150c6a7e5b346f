"""A linear layer whose weight is fake-quantized under scales that a rule finds for it, in one pass each time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qat.kernels import ops
from qat.kernels.linear import compute_dtype, masked
from qat.numerics.dynamic import check_rule
from qat.numerics.granularity import Granularity
from qat.scratch import scratch


def rule_quantized_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: tuple[Any, ...],
    granularity: Granularity,
    mask: Tensor | None = None,
    dense_gradient: bool = False,
) -> Tensor:
    """y = x @ fake_quantize(weight * mask)^T + bias; gradients pass straight through to the weight.

    What `fake_quantized_linear` computes with the qparams of the rule, where kernels find these while they read the
    weight: one launch for each pass, and nothing is kept but x and the weight.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.
        rule: `ops.rule_arguments`.
        granularity: who shares a scale.
        mask, dense_gradient: as for `fake_quantized_linear`.

    Returns:
        y `[..., out]`, in the dtype of x, or of autocast where that is on.
    """
    check_rule(rule[0], granularity, weight.shape)
    dtype = compute_dtype(x)
    if dtype != x.dtype:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    return _RuleQuantizedLinear.apply(x, weight, bias, mask, granularity, dense_gradient, *rule)


class _RuleQuantizedLinear(torch.autograd.Function):
    """dx = dy @ W_hat; dW = dy^T @ x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        granularity: Granularity,
        dense_gradient: bool,
        *rule: Any,
    ) -> Tensor:
        *ctx.rule, codebook, ctx.format = rule
        ctx.granularity, ctx.dense_gradient = granularity, dense_gradient
        ctx.save_for_backward(x, weight, mask, codebook)
        w_hat = ops.fake_quantize_dynamic_view(granularity.view(masked(weight, mask)), x.dtype, *rule)
        return F.linear(x, granularity.unview(w_hat, weight.shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, codebook = ctx.saved_tensors
        need_x, need_weight, need_bias, *others = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dweight = None
        if need_x:
            own = ctx.granularity.view(masked(weight, mask))
            w_hat = scratch("weight", own.shape, dy.dtype, own.device)
            ops.restore_dynamic_view_(own, w_hat, *ctx.rule, codebook, ctx.format)
            dx = dy @ ctx.granularity.unview(w_hat, weight.shape)
        if need_weight:
            dweight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            dweight = dweight if ctx.dense_gradient else masked(dweight, mask)
        return dx, dweight, rows.sum(0) if need_bias else None, *(None,) * len(others)
