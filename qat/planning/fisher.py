"""Costs from gradients of single predictions: the Fisher diagonal, and the gradient of the loss itself."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qat.planning.candidates import PlannedLayer
from qat.planning.predictions import Batch, summed_loss
from qat.planning.rows import tracked
from qat.transforms.importance import gradients_only_of, squares_into

# The cost of a layer from the errors of its weights, which are matrices by name.
Cost = Callable[[PlannedLayer, Mapping[str, Tensor]], float]
Sums = dict[Tensor, Tensor]


def fisher(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Cost:
    """0.5 sum_i F_ii error_i^2: the second-order increase of the KL divergence to full precision, in nats a token.

    F_ii = E_t E_{y ~ p} [(d log p(y | context t) / d w_i)^2], the diagonal of the Fisher information (as used in
    SqueezeLLM, arXiv 2306.07629). Labels are drawn from the model itself: then gradients of different tokens are
    uncorrelated, and the squared gradient of a batch's summed loss is an unbiased estimate of their sum, whatever the
    size of the batch. More and smaller batches lower its variance.
    """
    squares, tokens = _fisher_sums(model, layers, batches)
    return lambda layer, errors: 0.5 * _dot(layer, squares, errors, power=2) / tokens


def gradient(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Cost:
    """|sum_i g_i error_i| + 0.5 sum_i F_ii error_i^2, g being the gradient of the loss on the data: nats a token.

    The first order of the loss is what a model has that was never trained on these data.
    """
    squares, tokens = _fisher_sums(model, layers, batches)
    sums = _zeros(layers)
    for batch in tracked(batches, "gradients"):
        _backward(model, batch, sums, _add_into)
    return lambda layer, errors: (
        (abs(_dot(layer, sums, errors, power=1)) + 0.5 * _dot(layer, squares, errors, power=2)) / tokens
    )


def _fisher_sums(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> tuple[Sums, int]:
    """Sums of squared gradients of drawn labels, and the number of tokens."""
    sums, tokens = _zeros(layers), 0
    generator = torch.Generator(next(iter(sums)).device).manual_seed(0)
    for batch in tracked(batches, "Fisher"):
        tokens += _backward(model, batch, sums, squares_into, generator)
    return sums, tokens


def _backward(
    model: nn.Module,
    batch: Batch,
    sums: Sums,
    into: Callable[[Tensor], Callable[[Tensor], None]],
    draw: torch.Generator | None = None,
) -> int:
    """Add what `into` makes of the gradients of the loss, summed over tokens; of drawn labels where `draw` is given."""
    with gradients_only_of(model, sums), torch.enable_grad():
        hooks = [weight.register_post_accumulate_grad_hook(into(total)) for weight, total in sums.items()]
        try:
            loss, tokens = summed_loss(model, batch, draw)
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return tokens


def _add_into(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a weight's gradient to `total` and frees it."""

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad)
        weight.grad = None

    return hook


def _zeros(layers: Sequence[PlannedLayer]) -> Sums:
    return {w: torch.zeros_like(w, dtype=torch.float32) for layer in layers for w in layer.parameters().values()}


def _dot(layer: PlannedLayer, sums: Sums, errors: Mapping[str, Tensor], power: int) -> float:
    """sum_i sums_i error_i^power over the weights of `layer`."""
    weights = layer.parameters()
    return sum(float((layer.as_matrix(sums[weights[name]]) * e.pow(power)).sum()) for name, e in errors.items())
