"""Costs from errors of a layer's output, each counting as the loss's gradient there: a Kronecker-factored Fisher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.planning.candidates import PlannedLayer
from qat.planning.fisher import Cost
from qat.planning.grams import portions
from qat.planning.output import refuse_others_than_linear
from qat.planning.predictions import Batch, summed_loss
from qat.planning.rows import tracked
from qat.transforms.importance import gradients_only_of


@dataclass(frozen=True)
class Factors:
    """Of one layer, sums over tokens.

    Attributes:
        inputs: sum_t |g_t|^2 x_t x_t^T, `[in, in]`.
        outputs: sum_t g_t^2, `[out]`.
    """

    inputs: Tensor
    outputs: Tensor

    def quadratic(self, errors: Tensor) -> float:
        """sum_o share_o (E A E^T)_oo of errors E `[out, in]`; zero where nothing depends on the layer."""
        inputs, outputs = self.inputs.to(errors.device), self.outputs.to(errors.device)
        rows = ((errors @ inputs) * errors).sum(1)
        return float(outputs @ rows / outputs.sum()) if outputs.any() else 0.0

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add tokens that enter as `x` and leave with `gradient`."""
        rows, squares = x.flatten(0, -2).to(torch.float32), gradient.flatten(0, -2).to(torch.float32).square()
        self.outputs.add_(squares.sum(0))
        self.inputs.addmm_(rows.t(), rows * squares.sum(1, keepdim=True))


def kfac(model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]) -> Cost:
    """0.5 sum_o share_o (E A E^T)_oo: the second-order increase of the KL to full precision, in nats a token.

    x_t enters a layer at token t, and g_t is the gradient of the loss with respect to what leaves it, with labels
    drawn from the model itself. A = E_t[|g_t|^2 x_t x_t^T], and share_o = E_t[g_to^2] / E_t[|g_t|^2]. E are the errors
    of the layer's weights, all of them together: what GPTQ makes up for in other columns counts as made up for, which
    a diagonal does not see. Gradients of different tokens and outputs count as uncorrelated. As K-FAC (arXiv
    1503.05671), the Fisher matrix is a product of one factor for inputs and one for outputs; as in GuidedQuant (arXiv
    2505.07004), inputs are weighed by the gradients of their tokens, since the first token of a text has by far the
    largest inputs of some layers and next to no gradient.

    Raises:
        InputError: if a layer is not linear.
    """
    refuse_others_than_linear(layers, "kfac")
    factors: dict[str, Factors] = {}
    for together in portions(layers):
        found, tokens = _factors(model, together, batches)
        factors |= found
    return lambda layer, errors: 0.5 * factors[layer.name].quadratic(errors["weight"]) / tokens


def _factors(
    model: nn.Module, layers: Sequence[PlannedLayer], batches: Sequence[Batch]
) -> tuple[dict[str, Factors], int]:
    """The factors of every layer, kept off the device, and the number of tokens."""
    sums = {layer.name: _zeros(layer) for layer in layers}
    tokens = 0
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    handles = [layer.module.register_forward_hook(_add_to(sums[layer.name])) for layer in layers]
    try:
        # No weight needs its gradient: the graph starts at the outputs of the first layers.
        with gradients_only_of(model, ()), torch.enable_grad():
            for batch in tracked(batches, "K-FAC"):
                loss, count = summed_loss(model, batch, generator)
                loss.backward()
                tokens += count
    finally:
        for handle in handles:
            handle.remove()
    return {name: Factors(own.inputs.cpu(), own.outputs.cpu()) for name, own in sums.items()}, tokens


def _zeros(layer: PlannedLayer) -> Factors:
    (weight,) = layer.matrices().values()
    rows, columns = weight.shape
    return Factors(torch.zeros(columns, columns, device=weight.device), torch.zeros(rows, device=weight.device))


def _add_to(factors: Factors) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook: add the tokens of this call once their gradients are known."""

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        x = args[0].detach()
        output.register_hook(lambda gradient: factors.add(x, gradient))

    return hook
