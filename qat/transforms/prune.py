"""Prune the weights of a whole model: by magnitude, by Wanda, by SparseGPT."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn import QuantLinear
from qat.numerics.columns import Columns
from qat.numerics.sparsity import Pattern, magnitude_scores, mask_of, parse_pattern, wanda_scores
from qat.numerics.sparsity import sparsegpt as prune_weight
from qat.options import require_whole, require_within
from qat.quantizers import Quantizer
from qat.transforms.blocks import Block, walk
from qat.transforms.build import found_at
from qat.transforms.gptq import fix_scales
from qat.transforms.inputs import Group, hessians, squares
from qat.transforms.masks import prunable, refit, require_zeros, set_mask
from qat.transforms.plain import full_precision

# What becomes of one linear layer: its name, itself, and what is known of its input.
LayerWork = Callable[[str, QuantLinear, Tensor], None]


@torch.no_grad()
def magnitude(
    model: nn.Module,
    batches: Iterable[Any] = (),
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    scope: str = "matrix",
    exclude: str | Sequence[str] = (),
    head: bool = False,
) -> nn.Module:
    """Prune the weights of least magnitude (arXiv 1506.02626); needs no data.

    Linear layers, convolutions and experts are pruned, quantized or not; embeddings and routers are not. Pruned weights
    stay zero in training and in what is saved. Quantizers are fitted anew to the weights that are left.

    Args:
        model: prepared, or plain; plain layers then train in full precision, with their masks.
        batches: not looked at.
        sparsity: share of the weights of each layer that become zero.
        pattern: where zeros may lie: `unstructured`, or `2:4`, `4:8`: at most 2 of 4 consecutive weights are not zero.
        scope: what unstructured weights are compared within, `row` or `matrix`.
        exclude: names of layers that stay dense, with shell wildcards.
        head: prune the output head too.

    Returns:
        `model`.

    Raises:
        InputError: if the pattern does not fit, a grid has no zero, or `exclude` matches nothing.
    """
    zeros = parse_pattern(pattern, sparsity)
    layers = prunable(model, exclude, head)
    require_zeros(layers)
    for name, layer in layers.items():
        for weight in layer.weights():
            with found_at(name):
                mask = mask_of(magnitude_scores(weight.matrix), zeros, sparsity, scope)
            set_mask(name, layer, weight.name, mask)
        refit(layer)
    return model


def wanda(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    exclude: str | Sequence[str] = (),
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Prune the weights of each row that matter least to its output: |W_ij| |x_j| (Wanda, arXiv 2306.11695).

    Block by block, each seeing the inputs that the pruned ones before it make. The linear layers of the blocks are
    pruned; experts, embeddings and the output head stay dense. Otherwise as `magnitude`.

    Args:
        model: prepared, or plain.
        batches: mappings, passed as keywords.
        sparsity, pattern, exclude: as for `magnitude`.
        device: where to compute; blocks go there one at a time. Default: where the model is.
        folder: where finished blocks are kept, so that a run that was killed goes on; see `qat.transforms.discard`.

    Returns:
        `model`.

    Raises:
        InputError: as `magnitude`; or if the model has no blocks, or there is no data.
    """
    zeros = parse_pattern(pattern, sparsity)

    def prune(name: str, layer: QuantLinear, own: Tensor) -> None:
        set_mask(name, layer, "weight", mask_of(wanda_scores(layer.weight, own), zeros, sparsity))
        refit(layer)

    key = f"wanda {sparsity} {pattern} {exclude}"
    return _by_blocks(model, batches, zeros, exclude, squares, prune, "Wanda", device, folder, key)


def sparsegpt(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    exclude: str | Sequence[str] = (),
    damping: float = 0.01,
    block_size: int = 128,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Prune, and move the weights that are left onto their grids, in one pass that keeps the outputs.

    SparseGPT (arXiv 2301.00774): what is left takes up the errors of pruning and of rounding alike. Grids that follow
    from the extremes of the weights are fixed, as `gptq` fixes them; layers in full precision are only pruned.

    Args:
        model: prepared, or plain.
        batches: mappings, passed as keywords.
        sparsity, pattern, exclude: as for `magnitude`.
        damping: of the Hessian, as a share of the mean of its diagonal.
        block_size: columns whose updates of later ones are done together, and that compete for being kept.
        device, folder: as for `wanda`.

    Returns:
        `model`: its weights are pruned, and lie on their grids.

    Raises:
        InputError: as `wanda`; or if a Hessian cannot be inverted, or a grid has vector codes.
    """
    zeros = parse_pattern(pattern, sparsity)
    require_within("damping", damping, usual=0.01, low=0, high=1)
    require_whole("block_size", block_size, usual=128)
    solve = partial(prune_weight, pattern=zeros, sparsity=sparsity, damping=damping, block_size=block_size)

    def prune(name: str, layer: QuantLinear, hessian: Tensor) -> None:
        first = mask_of(wanda_scores(layer.weight, hessian.diagonal()), zeros, sparsity)
        columns = _columns(layer, hessian, first)
        found, mask = solve(layer.weight, hessian, columns=columns)
        layer.weight.copy_(found)
        set_mask(name, layer, "weight", mask)

    fix_scales(model)
    key = f"sparsegpt {sparsity} {pattern} {exclude} {damping} {block_size}"
    return _by_blocks(model, batches, zeros, exclude, hessians, prune, "SparseGPT", device, folder, key)


def _columns(layer: QuantLinear, hessian: Tensor, likely: Tensor) -> Columns | None:
    """The grid of `layer`, fitted to the weights that are `likely` to be kept; None without one."""
    quantizer, weight = layer.weight_quantizer, layer.weight.detach()
    if not isinstance(quantizer, Quantizer):
        return None
    quantizer.set_mask(likely)
    quantizer.initialize(weight, hessian.diagonal().expand_as(weight) if hessian.any() else None)
    qparams = quantizer.ready_qparams(quantizer.masked(weight))
    return Columns(qparams, quantizer.format, quantizer.granularity, weight.shape)


def _by_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    pattern: Pattern,
    exclude: str | Sequence[str],
    measure: Callable[[Block, Group], list[tuple[Group, Tensor]]],
    prune: LayerWork,
    title: str,
    device: torch.device | str | None,
    folder: str | Path | None,
    key: str,
) -> nn.Module:
    """Call `prune` for the linear layers of each block, with what `measure` finds of their inputs."""
    layers = {name: layer for name, layer in prunable(model, exclude).items() if isinstance(layer, QuantLinear)}
    if not layers:
        raise InputError(f"{title} prunes linear layers, and there is none left: take transforms=magnitude.")
    require_zeros(layers)

    @torch.no_grad()
    def work(block: Block) -> None:
        prefix = f"{block.name}."
        own: Group = {name.removeprefix(prefix): m for name, m in layers.items() if name.startswith(prefix)}
        for group, found in measure(block, own):
            for name, layer in group.items():
                with found_at(f"{prefix}{name}"):
                    prune(f"{prefix}{name}", layer, found)

    with full_precision(model):
        walk(model, batches, work, title, device, folder, key)
    return model
