"""Costs from the curvature of the loss: the trace of each layer's Hessian, by Hutchinson's estimator."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qat.planning.candidates import PlannedLayer
from qat.planning.fisher import Cost
from qat.planning.predictions import Batch, summed_loss
from qat.planning.rows import tracked
from qat.transforms.importance import gradients_only_of


def hutchinson(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Cost:
    """0.5 tr(H) / n sum_i error_i^2: every weight of a layer has the mean curvature of its n weights (nats a token).

    HAWQ-V2, arXiv 1911.03852. A layer of negative mean curvature, where the loss says that errors help, costs nothing.
    """
    traces = hessian_traces(model, layers, batches)
    return partial(_cost, traces)


def _cost(traces: Mapping[str, float], layer: PlannedLayer, errors: Mapping[str, Tensor]) -> float:
    squares = sum(float(e.square().sum()) for e in errors.values())
    return 0.5 * max(0.0, traces[layer.name]) / layer.weights * squares


def hessian_traces(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> dict[str, float]:
    """tr(H) of every layer: E[v . Hv] for random signs v, one draw for each batch and all layers at once.

    What v . Hv holds of two different layers averages to zero. Attention runs by plain matrix products, the only kernel
    of scaled_dot_product_attention that can be differentiated twice.
    """
    weights = [weight for layer in layers for weight in layer.parameters().values()]
    generator = torch.Generator(weights[0].device).manual_seed(0)
    totals, tokens = torch.zeros(len(weights), dtype=torch.float64), 0
    with gradients_only_of(model, weights), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for batch in tracked(batches, "Hutchinson"):
            loss, count = summed_loss(model, batch)
            signs = [_signs(weight, generator) for weight in weights]
            totals += torch.tensor(quadratic_forms(loss, weights, signs), dtype=torch.float64)
            tokens += count
    of_weight = dict(zip(weights, (totals / tokens).tolist(), strict=True))
    return {layer.name: sum(of_weight[weight] for weight in layer.parameters().values()) for layer in layers}


def quadratic_forms(loss: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[float]:
    """v_l . (H v)_l for every weight l, H being the Hessian of `loss` with respect to all of them."""
    gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    slope = torch.stack([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]).sum()
    products = torch.autograd.grad(slope, weights, materialize_grads=True)
    return [float((p * v).sum()) for p, v in zip(products, vectors, strict=True)]


def _signs(weight: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, weight.shape, generator=generator, device=weight.device)
    return (2 * bits - 1).to(weight.dtype)
