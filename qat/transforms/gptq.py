"""GPTQ of a whole model, block by block."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.nn import QuantLinear
from qat.numerics.gptq import gptq as gptq_weight
from qat.numerics.gptq import gptq_in_groups, output_errors
from qat.options import require_whole, require_within
from qat.quantizers import FixedQuantizer, Quantizer
from qat.transforms.blocks import Block, walk
from qat.transforms.build import found_at
from qat.transforms.groups import fit_group, group_size_of
from qat.transforms.inputs import hessians
from qat.transforms.layers import quant_layers
from qat.transforms.plain import full_precision
from qat.transforms.refine import refined
from qat.transforms.rounding import on_grid, quantizer_of
from qat.transforms.stack import Stack, stacks

# A stack and its Hessian to grid values, `[out, in]`.
RoundStack = Callable[[Stack, Tensor], Tensor]


def gptq(
    model: nn.Module,
    batches: Iterable[Any],
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    static_groups: bool = True,
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
        damping: of the Hessian, as a share of the mean of its diagonal; ten times as much where it is singular even so.
        act_order: round the columns with the largest inputs first.
        block_size: columns whose updates of later ones are done together.
        static_groups: find all scales from the weights as they were. False: those of a group when its first column is
            reached, from what the columns before it left of it; columns then keep their groups in `act_order` too.
            It makes no difference where all columns share a scale.
        true_sequential: let layers see the quantized ones before them in the same block too; takes as many passes over
            the data as a block has layers with inputs of their own, not one.
        importance: first fit the scales or codebooks anew, each error counting as the mean square of what it
            multiplies, where the quantizer is one that can.
        sweeps: how often to refine the result: scales and codebooks by least squares for the codes that were found,
            then codes by coordinate descent (QuantEase, arXiv 2309.01885); 0 leaves GPTQ's own.
        device: where to compute; blocks go there one at a time. Default: where the model is.
        folder: where finished blocks are kept, so that a run that was killed goes on; see `qat.transforms.discard`.

    Returns:
        `model`: its weights lie on their grids.

    Raises:
        InputError: if an option is out of range, the model has no blocks or no linear layer in them, a grid has vector
            codes, its scales cannot be found group by group without `static_groups`, there is no data, it holds NaN,
            or a Hessian cannot be inverted.
    """
    require_within("damping", damping, usual=0.01, low=0, high=1)
    require_whole("block_size", block_size, usual=128)
    require_whole("sweeps", sweeps, usual=1, least=0)
    fix_scales(model)
    key = f"gptq {damping} {act_order} {static_groups} {true_sequential} {importance} {sweeps}"
    round_stack: RoundStack = partial(_round_static, damping=damping, act_order=act_order, block_size=block_size)
    if not static_groups:
        round_stack = partial(
            _round_in_turn, static=round_stack, importance=importance, damping=damping, act_order=act_order
        )
    work = partial(
        gptq_block, round_stack=round_stack, true_sequential=true_sequential, importance=importance, sweeps=sweeps
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


def _round_static(stack: Stack, hessian: Tensor, **options: Any) -> Tensor:
    return gptq_weight(stack.weight, hessian, stack.columns(), **options)


def _round_in_turn(stack: Stack, hessian: Tensor, static: RoundStack, importance: bool, **options: Any) -> Tensor:
    """With scales that are found when their group is reached, if there are several groups in a row."""
    size = group_size_of(stack)
    if size is None:
        return static(stack, hessian)
    fit = partial(fit_group, stack, hessian.diagonal() if importance and hessian.any() else None)
    return gptq_in_groups(stack.weight, hessian, fit, size, **options)


@torch.no_grad()
def gptq_block(
    block: Block,
    round_stack: RoundStack = _round_static,
    true_sequential: bool = False,
    importance: bool = True,
    sweeps: int = 1,
) -> None:
    """Move the weights of every linear layer in `block` onto their grids; the options are those of `gptq`."""
    for group, hessian in hessians(block):
        if true_sequential:  # the layers before it have changed
            ((_, hessian),) = hessians(block, group)
        if importance and hessian.any():
            for name, layer in group.items():
                with found_at(f"{block.name}.{name}"):
                    _fit_scales(layer.weight, quantizer_of(layer), hessian)
        for stack in stacks(group):
            with found_at(f"{block.name}.{', '.join(stack.names)}"):
                stack.fill_(_rounded(stack, hessian, round_stack, sweeps))


@torch.no_grad()
def gptq_rounded(weight: Tensor, hessian: Tensor, quantizer: Quantizer) -> Tensor:
    """`weight` `[out, in]` on the grid of `quantizer`, in float32, as `gptq` with its default options leaves it.

    Args:
        hessian: X^T X of what it multiplies, `[in, in]`, up to a factor.
        quantizer: of fixed scales; it gets the grid that was found.
    """
    if hessian.any():
        _fit_scales(weight, quantizer, hessian)
    return _rounded(Stack(["weight"], [weight], [quantizer]), hessian, _round_static, sweeps=1)


def _fit_scales(weight: Tensor, quantizer: Quantizer, hessian: Tensor) -> None:
    """Fit scales and codebooks anew, errors counting as the mean square of what they multiply."""
    weight = weight.detach()
    quantizer.initialize(weight, hessian.diagonal().expand_as(weight))


def _rounded(stack: Stack, hessian: Tensor, round_stack: RoundStack, sweeps: int) -> Tensor:
    """The weights on their grids; each row by GPTQ or rounding, whichever is better, then refined."""
    weight = stack.weight
    found = round_stack(stack, hessian)
    rounded = torch.cat([on_grid(*pair) for pair in zip(stack.quantizers, stack.split(weight), strict=True)])
    better = output_errors(weight, found, hessian) < output_errors(weight, rounded, hessian)
    best = torch.where(better[:, None], found, rounded)
    for _ in range(sweeps):
        best = refined(stack, best, hessian)
    return best
