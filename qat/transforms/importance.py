"""Importance of single weights: fit codebooks where errors hurt, not where weights are many."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn import QuantLayer, QuantLinear
from qat.quantizers import KMeansQuantizer
from qat.transforms.layers import codebooks, quant_layers
from qat.transforms.plain import full_precision

_NO_DATA = "The codebooks have no data to find an importance from: set calibration_batches to 1 or more."
_NO_CODEBOOK = (
    "transforms={name} weighs the errors of codebooks{where} that k-means fits, and this scheme has none: take "
    "quantizer@scheme.weight=kmeans with init=kmeans, or transforms=calibrate."
)


def fisher(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Fit every k-means codebook anew, the error of each weight counting as its squared gradient, averaged.

    The diagonal of the Fisher information approximates that of the Hessian of the loss (SqueezeLLM, arXiv 2306.07629,
    section 4.1). Gradients are those of the full-precision model; each batch gives one, so small batches say more.
    Memory: one float32 a weight, and one gradient at a time.

    Args:
        model: prepared; called with each batch as keywords, returns an object with `loss`.
        batches: mappings that hold labels.

    Returns:
        `model`.

    Raises:
        InputError: if k-means fits no codebook, there are no batches, or the model returns no loss.
    """
    sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for _, weight, _ in _fitted(model)}
    if not sums:
        raise InputError(_NO_CODEBOOK.format(name="fisher", where=""))
    with full_precision(model), gradients_only_of(model, sums), torch.enable_grad():
        hooks = [weight.register_post_accumulate_grad_hook(squares_into(total)) for weight, total in sums.items()]
        try:
            count = sum(_backward(model, batch) for batch in batches)
        finally:
            for hook in hooks:
                hook.remove()
    return _fit(model, sums, count)


@torch.no_grad()
def hessian(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Fit every linear layer's codebook anew, the error of a weight counting as the mean square of what it multiplies.

    That is the diagonal of X^T X, the Hessian of each layer's own squared output error, the same for all rows. Layers
    that share a weight add up. Embeddings, convolutions and experts keep the codebooks that they have.

    Args:
        model: prepared.
        batches: mappings, passed as keywords.

    Returns:
        `model`.

    Raises:
        InputError: if k-means fits no linear layer's codebook, or there are no batches.
    """
    fitted = {weight for layer, weight, _ in _fitted(model) if isinstance(layer, QuantLinear)}
    layers = [layer for _, layer in quant_layers(model) if isinstance(layer, QuantLinear) and layer.weight in fitted]
    sums = {layer.weight: torch.zeros(layer.in_features, device=layer.weight.device) for layer in layers}
    if not sums:
        raise InputError(_NO_CODEBOOK.format(name="hessian", where=" of linear layers"))
    with full_precision(model):
        hooks = [layer.register_forward_pre_hook(_input_squares_into(sums[layer.weight])) for layer in layers]
        try:
            count = sum(_forward(model, batch) for batch in batches)
        finally:
            for hook in hooks:
                hook.remove()
    return _fit(model, {weight: total.expand_as(weight) for weight, total in sums.items()}, count)


@torch.no_grad()
def _fit(model: nn.Module, sums: Mapping[Tensor, Tensor], count: int) -> nn.Module:
    """Initialize the quantizer of each weight; sums serve as well as means, because only ratios within a row count."""
    if not count:
        raise InputError(_NO_DATA)
    for layer, weight, quantizer in _fitted(model):
        if weight in sums:
            quantizer.initialize(layer.as_matrix(layer, weight), layer.as_matrix(layer, sums[weight]))
    return model


def _fitted(model: nn.Module) -> Iterator[tuple[QuantLayer, Tensor, KMeansQuantizer]]:
    """Every weight whose codebook k-means fits, with its layer and its quantizer; other starts take no importance."""
    for layer, name, quantizer in codebooks(model):
        if quantizer.init == "kmeans":
            yield layer, getattr(layer, name), quantizer


@contextmanager
def gradients_only_of(model: nn.Module, chosen: Iterable[Tensor]) -> Iterator[None]:
    """Other parameters need no gradient for a while."""
    before: dict[Tensor, bool] = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needs in before.items():
            parameter.requires_grad_(needs)


def squares_into(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a weight's squared gradient to `total` and frees the gradient."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad.to(torch.float32).square())
        weight.grad = None

    return hook


def _input_squares_into(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds the mean square of each input feature to `total`."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].detach().to(torch.float32).square().flatten(0, -2)
        total.add_(squares.sum(0) / max(1, len(squares)))  # an expert may be given no token at all

    return hook


def _backward(model: nn.Module, batch: Any) -> int:
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise InputError("transforms=fisher needs a loss: give it batches with labels, or take transforms=hessian.")
    loss.backward()
    return 1


def _forward(model: nn.Module, batch: Any) -> int:
    model(**batch)
    return 1
