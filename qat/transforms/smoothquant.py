"""SmoothQuant: move outliers of activations into the weights that multiply them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn import QuantLayer
from qat.options import require_within
from qat.quantizers import Quantizer
from qat.transforms.blocks import Block, walk
from qat.transforms.channels import Norm, input_matrix
from qat.transforms.inputs import magnitudes
from qat.transforms.layers import quant_layers
from qat.transforms.neighbours import Fold, neighbours
from qat.transforms.plain import full_precision

# Of a channel that is always zero, or that no weight reads: it keeps a finite scale.
_LEAST = 1e-5


def smoothquant(
    model: nn.Module,
    batches: Iterable[Any],
    alpha: float = 0.5,
    between_layers: bool = False,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Divide every channel of the activations that are quantized by a scale, and multiply weights by it.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), with X of the calibration data and W of all layers that read it
    (SmoothQuant, arXiv 2211.10438, equation 4). The scale goes into the gain of the norm before them, so the model
    computes what it did. Quantizers of the weights that change are fitted anew; static activations need `calibrate`.

    Args:
        model: prepared; some layers quantize their inputs.
        batches: mappings, passed as keywords.
        alpha: how much of the difficulty moves from activations to weights, 0 to 1.
        between_layers: scale also what one linear layer hands to another (values to the output projection, up to down),
            which the paper leaves alone.
        device: where to compute; blocks go there one at a time. Default: where the model is.

    Returns:
        `model`.

    Raises:
        InputError: if alpha lies outside 0 to 1, no layer quantizes its input, no norm before one can take a scale, or
            there is no data.
    """
    require_within("alpha", alpha, usual=0.5, low=0, high=1)
    if not any(_quantizes_input(layer) for _, layer in quant_layers(model)):
        raise InputError(
            "SmoothQuant serves schemes that quantize activations, and no layer quantizes its input: take scheme=w8a8, "
            "or transforms=awq for weights alone."
        )
    folds = [fold for fold in neighbours(model) if isinstance(fold.source, Norm) or between_layers]
    folds = [fold for fold in folds if any(map(_quantizes_input, fold.targets.values()))]
    if not folds:
        raise InputError(
            "No norm could be proven to feed the layers that quantize their inputs: leave out SmoothQuant."
        )

    def work(block: Block) -> None:
        own = [fold for fold in folds if fold.block == block.name]
        for fold, largest in zip(own, magnitudes(block, [_leader(fold) for fold in own], largest=True), strict=True):
            fold.fold_(_scale(fold, largest, alpha))

    with full_precision(model):
        walk(model, batches, work, "SmoothQuant", device)
    return model


@torch.no_grad()
def _scale(fold: Fold, x: Tensor, alpha: float) -> Tensor:
    """The scale of every channel of the source, from the largest inputs `[in]` and the weights."""
    w = torch.stack([input_matrix(target).abs().amax(0).to(torch.float32) for target in fold.targets.values()]).amax(0)
    x, w = (fold.by_channel(each, "amax").clamp(min=_LEAST) for each in (x, w))
    return (x**alpha / w ** (1 - alpha)).clamp(min=_LEAST)


def _leader(fold: Fold) -> nn.Module:
    return next(iter(fold.targets.values()))


def _quantizes_input(module: nn.Module) -> bool:
    return isinstance(module, QuantLayer) and isinstance(module.input_quantizer, Quantizer)
