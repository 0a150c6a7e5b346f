"""Change the channels that a module reads or writes, by changing its Parameters in place.

A module *reads* channels with the columns of its weight, and *writes* them with the rows and the bias, a norm with its
gain. Everything is computed in float64 and rounded once.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
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
    return getattr(module, _name_of_input(module))


def input_matrix(module: Any) -> Tensor:
    """The same as the matrix `[rows, in]`."""
    return QuantExperts.as_matrix(module, input_weight(module)) if is_experts(module) else module.weight


def inputs_changed(module: Any, change: Change, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What the Parameters of `module` would be, by name, with another matrix to multiply its input by.

    Args:
        change: takes the matrix, `[rows, in]` or one for each expert, `[experts, out, in]`.
        dtype: to compute in.
    """
    name, weight = _name_of_input(module), input_weight(module)
    if not is_experts(module):
        return {name: change(weight.to(dtype)).to(weight.dtype)}
    changed = change(QuantExperts.as_matrices(module, weight).to(dtype)).to(weight.dtype)
    return {name: QuantExperts.as_matrices(module, changed)}


def outputs_changed(module: Any, change: Change, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same with other matrices `[..., out, columns]` whose rows `module` returns, and with biases as one column.

    Each expert has a matrix of its own; that of an embedding is its table transposed.
    """
    name = QuantExperts.names(module)[-1] if is_experts(module) else "weight"
    bias_name = f"{name}_bias" if is_experts(module) else "bias"
    weight, bias = getattr(module, name), getattr(module, bias_name, None)
    if is_experts(module):
        changed = QuantExperts.as_matrices(module, change(QuantExperts.as_matrices(module, weight).to(dtype)))
    else:
        changed = change(weight.T.to(dtype)).T if is_embedding(module) else change(weight.to(dtype))
    found = {name: changed.to(weight.dtype)}
    if bias is not None:
        found[bias_name] = change(bias.to(dtype).unsqueeze(-1)).squeeze(-1).to(bias.dtype)
    return found


@torch.no_grad()
def change_inputs_(module: nn.Module, change: Change) -> None:
    """Make `inputs_changed` the Parameters of `module`, in place."""
    _fill(module, inputs_changed(module, change))


@torch.no_grad()
def change_outputs_(module: nn.Module, change: Change) -> None:
    """Make `outputs_changed` the Parameters of `module`, in place."""
    _fill(module, outputs_changed(module, change))


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


def _name_of_input(module: nn.Module) -> str:
    return QuantExperts.names(module)[0] if is_experts(module) else "weight"


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module.get_parameter(name).copy_(tensor)


def _is_router(module: Any) -> bool:
    """Whether `module` is made of nothing but a matrix, and is not one of torch's own layers."""
    weight = getattr(module, "weight", None)
    own = isinstance(module, QuantLayer) or type(module).__module__.startswith("torch.")
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not own and not is_embedding(module)


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _CLOSE * b.norm()) and bool(b.any())
