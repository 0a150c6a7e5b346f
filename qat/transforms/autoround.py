"""AutoRound of a whole model: rounding that is learned, block by block."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import InputError, nearest
from qat.options import require_whole, require_within
from qat.transforms.block_error import Drawn, block_error, gradients
from qat.transforms.blocks import Block, walk
from qat.transforms.build import found_at
from qat.transforms.gptq import fix_scales, gptq_block
from qat.transforms.inputs import quantized_linears
from qat.transforms.plain import full_precision, uncalibrated_off
from qat.transforms.rounding import LearnedRounding, learned_rounding, on_grid, quantizer_of

# How far a weight may go, in units of the distance between the grid values around it. From between two of them half of
# it leads to either; from one of them, where GPTQ puts a weight, it would lead nowhere.
_REACH = {"nearest": 0.5, "gptq": 1.0}


def autoround(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int = 200,
    batch_size: int = 8,
    scale_reach: float = 0.25,
    start: str = "nearest",
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Learn how the linear layers of each block round, by signs of gradients (SignRound, arXiv 2309.05516).

    A weight w is rounded as w + V g, with V in [-1/2, 1/2] and g the distance between the two grid values around it, so
    that it can become either. V and log2 of the scales follow the signs of their gradients, in steps whose lengths
    fall to zero and sum up to 1/2 and to `scale_reach`. The loss is the mean squared error of what leaves the block,
    given what the quantized blocks before it make, against the model in full precision. As the steps end at zero, the
    last is the best, and is kept, unless the block's error on all batches was less before the first. Activation
    quantizers are at work meanwhile; static ones that nothing calibrated yet let everything through. Zero points and
    codebooks stay as they are.

    Args:
        model: prepared.
        batches: mappings, passed as keywords.
        steps: of gradient descent for each block.
        batch_size: sequences for each step; at least those of one batch are taken.
        scale_reach: how far scales may go, in powers of two; 0 leaves them.
        start: the rounding to set out from: `nearest`, or `gptq`, where V lies in [-1, 1].
        device: where to compute; blocks go there one at a time. Default: where the model is.
        folder: where finished blocks are kept, so that a run that was killed goes on; see `qat.transforms.discard`.

    Returns:
        `model`: its weights lie on their grids.

    Raises:
        InputError: if the model has no blocks, no linear layer in them has a quantized weight, a grid has vector codes,
            all weights lie on their grids already, an option is out of range, there is no data, or it holds NaN.
    """
    _check(model, steps, batch_size, scale_reach, start)
    fix_scales(model)
    learn = partial(_learn, steps=steps, batch_size=batch_size, reach=_REACH[start], scale_reach=scale_reach)
    work = partial(_autoround_block, learn=learn, start=start)
    key = f"autoround {steps} {batch_size} {scale_reach} {start}"
    with uncalibrated_off(model):
        walk(model, batches, work, "AutoRound", device, folder, key, with_targets=True)
    return model


def _check(model: nn.Module, steps: int, batch_size: int, scale_reach: float, start: str) -> None:
    if start not in _REACH:
        raise InputError(f"Rounding does not start from '{start}'.{nearest(start, _REACH)}")
    require_whole("steps", steps, usual=200)
    require_whole("batch_size", batch_size, usual=8)
    require_within("scale_reach", scale_reach, usual=0.25, low=0, high=1)
    layers = quantized_linears(model).values()
    if not layers:
        raise InputError("AutoRound rounds quantized linear layers, and the model has none: prepare it with scheme=w4.")
    if all(torch.equal(on_grid(quantizer_of(layer), layer.weight), layer.weight) for layer in layers):
        raise InputError(
            "All weights lie on their grids already, so nothing is left to round: leave out gptq before "
            "autoround, which does it itself with start=gptq."
        )


def _autoround_block(block: Block, learn: Callable[[Block, list[LearnedRounding]], None], start: str) -> None:
    """Learn, and keep what was learned if it serves the block better than what it started from."""
    layers = quantized_linears(block.module).values()
    if not layers:
        return
    with found_at(block.name):
        if start == "gptq":
            with full_precision(block.module):
                gptq_block(block)
        before, error = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}, block_error(block)
        with learned_rounding(layers) as learned:
            learn(block, learned)
    if not block_error(block) < error:
        block.module.load_state_dict(before)
        for layer in layers:
            layer.weight.detach().copy_(on_grid(quantizer_of(layer), layer.weight))


def _learn(
    block: Block, learned: list[LearnedRounding], steps: int, batch_size: int, reach: float, scale_reach: float
) -> None:
    """Take the steps of one block."""
    parameters = [p for rounding in learned for p in rounding.parameters()]
    drawn = Drawn(block, batch_size)
    for step in range(steps):
        found = gradients(block, parameters, drawn())
        length = 2 * (1 - (step + 0.5) / steps) / steps  # these sum up to 1
        for rounding in learned:
            rounding.step_(found, length * reach, length * scale_reach)
