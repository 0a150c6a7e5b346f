"""Change the channels that a module reads or writes, by changing its Parameters in place.

A module *reads* channels with the columns of its weight, and *writes* them with the rows and the bias, a norm with its
gain. Everything is computed in float64 and rounded once.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.nn import QuantCustomEmbedding, QuantExperts, QuantLayer
from qat.nn.experts import is_experts
from qat.quantizers import Quantizer

Change = Callable[[Tensor], Tensor]

# How near a module's answer in bfloat16 comes to what its Parameters say.
_CLOSE = 2e-2


@dataclass(frozen=True)
class Norm:
    """y = normalized(x) * gain + bias, as `norm_of` has proven of `module`.

    Attributes:
        offset: what the module adds to its weight: the gain is weight + offset (Gemma: 1).
        centers: whether it takes off the mean over the channels first, as LayerNorm does.
    """

    module: Any
    offset: float
    centers: bool

    @property
    def gain(self) -> Tensor:
        return self.module.weight.detach().double() + self.offset

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().double().clone()  # a copy also where it is float64 already

    @torch.no_grad()
    def fill_(self, gain: Tensor, bias: Tensor | None) -> None:
        """Set gain and bias; a bias that the module has no place for is None."""
        self.module.weight.copy_(gain - self.offset)
        if bias is not None:
            self.module.bias.copy_(bias)


@torch.no_grad()
def norm_of(module: nn.Module, x: Tensor) -> Norm | None:
    """`module` as a norm, or None if it does not answer to `x` `[..., channels]` as one with a gain would."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or next(module.children(), None) is not None:
        return None
    if any(p.shape != x.shape[-1:] for p in module.parameters()) or not set(module._parameters) <= {"weight", "bias"}:
        return None
    probe: Any = copy.deepcopy(module)
    bias = 0 if getattr(module, "bias", None) is None else module.bias
    for offset in (0.0, 1.0):
        probe.weight.fill_(1 - offset)
        normalized = probe(x) - bias
        if _is_close(module(x), normalized * (weight + offset) + bias):
            shifted = probe(x + x.abs().mean()) - bias
            return Norm(module, offset, _is_close(shifted, normalized))
    return None


def reads_channels(module: nn.Module) -> bool:
    """Whether `module` multiplies what it is given by a matrix: linear layers, experts and their routers."""
    return isinstance(module, nn.Linear) or is_experts(module) or _is_router(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether `module` looks up the rows of a table."""
    return isinstance(module, nn.Embedding | QuantCustomEmbedding)


def written(module: Any) -> int | None:
    """How many channels `module` writes, if the rows of a matrix are what it returns."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if is_experts(module):
        return QuantExperts.features(module)[1]
    return module.weight.shape[1] if is_embedding(module) else None


def input_weight(module: Any) -> nn.Parameter:
    """The Parameter that `module` multiplies its input by."""
    return getattr(module, QuantExperts.names(module)[0]) if is_experts(module) else module.weight


def input_matrix(module: Any) -> Tensor:
    """The same as the matrix `[rows, in]`."""
    return QuantExperts.as_matrix(module, input_weight(module)) if is_experts(module) else module.weight


@torch.no_grad()
def change_inputs_(module: Any, change: Change) -> None:
    """Put `change` of it in the place of the matrix `[rows, in]` that `module` multiplies its input by."""
    if is_experts(module):
        for matrix in QuantExperts.as_matrices(module, input_weight(module)):
            matrix.copy_(change(matrix.double()))
    else:
        module.weight.copy_(change(module.weight.double()))


@torch.no_grad()
def change_outputs_(module: Any, change: Change) -> None:
    """Put `change` of it in the place of every matrix `[out, columns]` whose rows `module` returns, and of its bias.

    Each expert has one of its own; that of an embedding is its table transposed.
    """
    if is_experts(module):
        name = QuantExperts.names(module)[-1]
        matrices: Iterable[Tensor] = QuantExperts.as_matrices(module, getattr(module, name))
        biases = getattr(module, f"{name}_bias", None)
    else:
        matrices = [module.weight.T if is_embedding(module) else module.weight]
        biases = None if getattr(module, "bias", None) is None else module.bias[None]
    for matrix in matrices:
        matrix.copy_(change(matrix.double()))
    for bias in () if biases is None else biases:
        bias.copy_(change(bias.double()[:, None])[:, 0])


@torch.no_grad()
def reinitialize_(modules: Iterable[nn.Module]) -> None:
    """Fit the weight quantizers of `modules` to the weights as they are now; static scales of activations are dropped.

    What flows through those modules is another, so `calibrate` has to find these anew.
    """
    for module in modules:
        if not isinstance(module, QuantLayer):
            continue
        for weight in module.weights():
            if isinstance(weight.quantizer, Quantizer):
                weight.quantizer.initialize(weight.matrix)
        for quantizer in (module.input_quantizer, module.output_quantizer):
            if isinstance(quantizer, Quantizer) and quantizer.rule is None:
                quantizer.initialized = False


def _is_router(module: Any) -> bool:
    """Whether `module` is made of nothing but a matrix, and is not one of torch's own layers."""
    weight = getattr(module, "weight", None)
    own = isinstance(module, QuantLayer) or type(module).__module__.startswith("torch.")
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not own and not is_embedding(module)


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _CLOSE * b.norm()) and bool(b.any())
