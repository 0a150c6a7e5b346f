"""GPTQ of a whole model, block by block."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels import ops
from qat.nn import QuantLinear
from qat.numerics.gptq import ColumnGrid, output_errors
from qat.numerics.gptq import gptq as gptq_weight
from qat.quantizers import FixedQuantizer, Quantizer
from qat.transforms.blocks import Block, walk
from qat.transforms.build import found_at
from qat.transforms.inputs import hessians, inputs
from qat.transforms.layers import quant_layers
from qat.transforms.plain import full_precision
from qat.transforms.refine import columns_of, refined

# A weight, its Hessian and the grid of its columns, to grid values.
RoundWeight = Callable[[Tensor, Tensor, ColumnGrid], Tensor]


def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    true_sequential: bool = False,
    importance: bool = True,
    sweeps: int = 1,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Move the weights of every linear layer in the model's blocks onto their grids, by GPTQ (arXiv 2210.17323).

    The grid is that of each layer's weight quantizer: integers, floats or a codebook, with static scales; those that
    follow from the extremes of the weights are fixed as they are now. A row for which the result is worse than rounding
    is rounded. Other layers (embeddings, experts, an output head) are rounded as ever.

    Args:
        model: prepared.
        batches: mappings, passed as keywords.
        damping: of the Hessian, as a share of the mean of its diagonal.
        act_order: round the columns with the largest inputs first.
        block_size: columns whose updates of later ones are done together.
        true_sequential: let layers see the quantized ones before them in the same block too; takes as many passes over
            the data as a block has layers with inputs of their own, not one.
        importance: first fit the scales or codebooks anew, each error counting as the mean square of what it
            multiplies, where the quantizer is one that can.
        sweeps: how often to refine the result: scales and codebooks by least squares for the codes that were found,
            then codes by coordinate descent (QuantEase, arXiv 2309.01885); 0 leaves GPTQ's own.
        device: where to compute; blocks go there one at a time. Default: where the model is.
        folder: where finished blocks are kept, so that a run that was killed goes on.

    Returns:
        `model`: its weights lie on their grids.

    Raises:
        InputError: if the model has no blocks or no linear layer in them, a grid has vector codes, there is no data, it
            holds NaN, or a Hessian cannot be inverted.
    """
    fix_scales(model)
    key = f"gptq {damping} {act_order} {true_sequential} {importance} {sweeps}"
    round_weight = partial(gptq_weight, damping=damping, act_order=act_order, block_size=block_size)
    work = partial(
        gptq_block, round_weight=round_weight, true_sequential=true_sequential, importance=importance, sweeps=sweeps
    )
    with full_precision(model):
        walk(model, batches, work, "GPTQ", device, folder, key)
    return model


def fix_scales(model: nn.Module) -> None:
    """Let the weight quantizers of linear layers hold the scales that follow from the weights now."""
    fixed: dict[Quantizer, Quantizer] = {}
    for _, layer in quant_layers(model):
        quantizer = getattr(layer, "weight_quantizer", None)
        if isinstance(layer, QuantLinear) and isinstance(quantizer, Quantizer):
            if quantizer not in fixed:
                fixed[quantizer] = with_fixed_scales(quantizer, layer.weight)
            layer.weight_quantizer = fixed[quantizer]


def with_fixed_scales(quantizer: Quantizer, weight: Tensor) -> Quantizer:
    """`quantizer`; or where its scales follow from the extremes of `weight`, one that holds them as they are now."""
    return quantizer if quantizer.clips else FixedQuantizer(quantizer, weight.detach())


@torch.no_grad()
def gptq_block(
    block: Block,
    round_weight: RoundWeight = gptq_weight,
    true_sequential: bool = False,
    importance: bool = True,
    sweeps: int = 1,
) -> None:
    """Move the weights of every linear layer in `block` onto their grids; the options are those of `gptq`."""
    groups = inputs(block)
    for together in [[group] for group in groups] if true_sequential else [groups]:
        for group, hessian in zip(together, hessians(block, together), strict=True):
            for name, layer in group.items():
                quantizer = layer.weight_quantizer
                assert isinstance(quantizer, Quantizer)
                with found_at(f"{block.name}.{name}"):
                    w_hat = gptq_rounded(layer.weight, hessian, quantizer, round_weight, importance, sweeps)
                layer.weight.copy_(w_hat)


@torch.no_grad()
def gptq_rounded(
    weight: Tensor,
    hessian: Tensor,
    quantizer: Quantizer,
    round_weight: RoundWeight = gptq_weight,
    importance: bool = True,
    sweeps: int = 1,
) -> Tensor:
    """`weight` `[out, in]` on the grid of `quantizer`, in float32; each row by GPTQ or rounding, whichever is better.

    Args:
        hessian: X^T X of what it multiplies, `[in, in]`, up to a factor.
        quantizer: of fixed scales; it gets the grid that was found.
        round_weight, importance, sweeps: as of `gptq`.
    """
    weight = weight.detach()
    if importance and hessian.any():
        quantizer.initialize(weight, hessian.diagonal().expand_as(weight))
    found = round_weight(weight, hessian, columns_of(quantizer, weight))
    grid = quantizer.ready_qparams(quantizer.masked(weight)), quantizer.format, quantizer.granularity
    rounded = quantizer.masked(ops.fake_quantize(weight, *grid)).to(torch.float32)
    better = output_errors(weight, found, hessian) < output_errors(weight, rounded, hessian)
    best = torch.where(better[:, None], found, rounded)
    for _ in range(sweeps):
        best = refined(weight, best, hessian, quantizer)
    return best
