"""AWQ of a whole model, block by block: scales that spare the weights that matter, then clipping."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.kernels import ops
from qat.nn import QuantLinear
from qat.numerics.gptq import output_errors
from qat.numerics.search import least_place
from qat.options import require_whole
from qat.quantizers import Quantizer
from qat.transforms.blocks import Block, walk
from qat.transforms.build import found_at
from qat.transforms.clip import clip_
from qat.transforms.inputs import hessians, is_quantized_linear, magnitudes
from qat.transforms.layers import quant_layers
from qat.transforms.neighbours import Fold, Source, neighbours
from qat.transforms.plain import full_precision

_LEAST = 1e-4  # of a mean activation, so that the scale of a silent channel stays finite
# How much larger the error of a linear layer may get that a scale goes into. Where each row has scales of its own it
# only changes by how these are rounded; where rows share one, most scales would make it many times larger.
_SLACK = 1.01


def awq(
    model: nn.Module,
    batches: Iterable[Any],
    grid: int = 20,
    clip: bool = True,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Scale the channels of every linear layer by how large their inputs are, then clip its weights (arXiv 2306.00978).

    For all layers that read the same tensor, s = mean|X|^alpha, and alpha is the one of `grid` values in [0, 1) with
    the least squared error of their outputs, tr((W - W_hat) X^T X (W - W_hat)^T), where W_hat is Q(W s) / s under each
    layer's own quantizer. Zero is among them, so no group of layers gets worse. The scale goes into the norm before
    them, or the linear layer, whose own error must not grow: the model computes what it did. Then every group of
    weights is clipped where the same error is least. Nothing is rounded: `convert` does that, or `gptq` after this.

    Layers without a source that can be proven (see `neighbours`) are only clipped; experts keep their weights.

    Args:
        model: prepared.
        batches: mappings, passed as keywords.
        grid: how many exponents to choose from. Not all are tried, see `qat.numerics.search.least_place`.
        clip: search the clipping; k-means and vector codebooks, which have no end to clip at, never do.
        device: where to compute; blocks go there one at a time. Default: where the model is.
        folder: where finished blocks are kept, so that a run that was killed goes on; see `qat.transforms.discard`.

    Returns:
        `model`; quantizers of the weights that changed are fitted anew.

    Raises:
        InputError: if the model has no blocks, no linear layer in them has a quantized weight, there is no data, it
            holds NaN, or `grid` is no number of exponents.
    """
    require_whole("grid", grid, usual=20)
    if not any(is_quantized_linear(layer) for _, layer in quant_layers(model)):
        raise InputError("AWQ scales quantized linear layers, and the model has none: prepare it with scheme=w4.")
    folds = [fold for fold in neighbours(model) if _can_judge(fold)]
    with full_precision(model):
        work = partial(_awq_block, folds=folds, grid=grid, clip=clip)
        walk(model, batches, work, "AWQ", device, folder, f"awq {grid} {clip}")
    return model


def _can_judge(fold: Fold) -> bool:
    """Whether what is quantized and reads the source are linear layers, and there are some."""
    quantized = [m for m in fold.targets.values() if getattr(m, "packs", False)]
    return bool(quantized) and all(map(is_quantized_linear, quantized))


@torch.no_grad()
def _awq_block(block: Block, folds: list[Fold], grid: int, clip: bool) -> None:
    own = [fold for fold in folds if fold.block == block.name]
    found = hessians(block)
    means = magnitudes(block, [next(iter(fold.targets.values())) for fold in own])
    moments: dict[nn.Module, Tensor] = {layer: moment for group, moment in found for layer in group.values()}
    for fold, mean in zip(own, means, strict=True):
        with found_at(fold.name):
            _scale(fold, mean, moments, grid)
    if clip:
        for group, moment in found:
            for name, layer in group.items():
                with found_at(f"{block.name}.{name}"):
                    clip_(layer, moment)


def _scale(fold: Fold, mean: Tensor, moments: Mapping[nn.Module, Tensor], grid: int) -> None:
    """Fold the best scale into the source, and into the moment of what it returns."""
    layers = [m for m in fold.targets.values() if isinstance(m, QuantLinear) and is_quantized_linear(m)]
    magnitude = fold.by_channel(mean, "mean").clamp(min=_LEAST)

    def scale(step: int) -> Tensor:
        own = fold.only_read(magnitude ** (step / grid))
        read = own[fold.columns]
        return fold.only_read(own / (read.max() * read.min()).sqrt())

    most = _source_error(fold.source, moments, scale(0)) * _SLACK

    def error(step: int) -> float:
        if step and _source_error(fold.source, moments, scale(step)) > most:
            return math.inf
        return _errors(layers, moments, scale(step)[fold.columns])

    best = scale(least_place(error, grid))
    fold.fold_(best)
    moments[layers[0]].div_(best[fold.columns]).div_(best[fold.columns][:, None])


def _errors(layers: list[QuantLinear], moments: Mapping[nn.Module, Tensor], columns: Tensor) -> float:
    """Squared error of what `layers` return, their weights rounded under a scale of each column."""
    return float(sum(_error(layer, moments[layer], columns) for layer in layers))


def _source_error(source: Source, moments: Mapping[nn.Module, Tensor], scale: Tensor) -> float:
    """The same for a linear layer whose rows are divided by `scale`; norms are not rounded."""
    if not isinstance(source, QuantLinear) or source not in moments:
        return 0.0
    return float(_error(source, moments[source], 1 / scale[:, None]))


def _error(layer: QuantLinear, moment: Tensor, scale: Tensor) -> Tensor:
    """Of a layer whose weight is rounded as Q(W * scale) / scale."""
    weight, quantizer = layer.weight.detach(), layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    scaled = (weight.to(torch.float32) * scale).to(weight.dtype)
    quantizer.initialize(scaled)
    grid = quantizer.ready_qparams(scaled), quantizer.format, quantizer.granularity
    w_hat = ops.fake_quantize(scaled, *grid).to(torch.float32) / scale
    return output_errors(weight, w_hat, moment).sum()
