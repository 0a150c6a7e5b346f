"""The layers that a plan is for, what each of them may get, and what that takes to store."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.nn import QuantLayer, quant_class
from qat.numerics.metrics import stored_bits
from qat.quantizers import LSQQuantizer, Quantizer
from qat.transforms.build import found_at, made
from qat.transforms.layers import conv1d_to_linear, kept_layers, plain_layers, quant_layers
from qat.transforms.roles import check_weight
from qat.transforms.rules import QuantizerFactory, Scheme, given


@dataclass(frozen=True)
class Candidate:
    """A quantizer that a layer may get.

    Args:
        factory: makes it; None and NoQuantizer leave the layer in full precision.
        option: what the config group `quantizer` calls it; a plan with candidates that have none makes no scheme yaml.
        options: every option of it, as in that yaml.
    """

    factory: QuantizerFactory
    option: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantizes(self) -> bool:
        return given(self.factory)


@dataclass(frozen=True)
class PlannedLayer:
    """A layer in full precision that a plan chooses a candidate for."""

    name: str
    module: nn.Module
    kind: type[QuantLayer]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its weights by name."""
        return {name: getattr(self.module, name) for name in self.kind.names(self.module)}

    def matrices(self) -> dict[str, Tensor]:
        """Its weights as the matrices `[rows, columns]` that are quantized."""
        return {name: self.as_matrix(weight.detach()) for name, weight in self.parameters().items()}

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like one of its weights, as a matrix."""
        return self.kind.as_matrix(self.module, tensor)

    @property
    def weights(self) -> int:
        return sum(weight.numel() for weight in self.parameters().values())


Candidates = Mapping[str, Candidate]
# A number for every layer and candidate.
Table = dict[str, dict[str, float]]


def integers(bits: Iterable[int] = range(2, 9), group_size: int = 64) -> dict[str, Candidate]:
    """Integers of so many bits with learned scales, a scale for each group: `int2` to `int8`."""
    options = {"granularity": f"per_group_{group_size}", "symmetric": True, "scale_dtype": "bfloat16"}
    return {f"int{b}": _learned_integers({"bits": b} | options) for b in bits}


def _learned_integers(options: dict[str, Any]) -> Candidate:
    return Candidate(partial(LSQQuantizer, **options), "lsq", options)


def planned_layers(model: nn.Module, exclude: str | Sequence[str] = ()) -> dict[str, PlannedLayer]:
    """Every layer of `model` that holds weights, but the output head, embeddings, routers and those of `exclude`.

    GPT-2's Conv1D becomes nn.Linear, as `prepare` does it.

    Args:
        exclude: names with shell wildcards; these stay in full precision and count in no budget.

    Raises:
        InputError: if the model is prepared or holds no such layer, a pattern matches none, or layers share a weight.
    """
    for name, _ in quant_layers(model):
        raise InputError(f"{name} is quantized already: plan with the full-precision model, before qat.prepare.")
    conv1d_to_linear(model)
    plain = plain_layers(model)
    kept = kept_layers(model, plain, Scheme())
    left = [name for name in plain if name not in kept]
    for pattern in (exclude,) if isinstance(exclude, str) else exclude:
        remaining = [name for name in left if not fnmatchcase(name, pattern)]
        if len(remaining) == len(left):
            raise InputError(f"exclude '{pattern}' matches no layer.{nearest(pattern, left[:20])}")
        left = remaining
    if not left:
        raise InputError("The model has no layer to plan for: it holds only what stays in full precision, or exclude.")
    layers = {name: _planned(name, plain[name]) for name in left}
    _refuse_shared(layers)
    return layers


def _planned(name: str, module: nn.Module) -> PlannedLayer:
    kind = quant_class(module)
    assert kind is not None
    return PlannedLayer(name, module, kind)


def _refuse_shared(layers: Mapping[str, PlannedLayer]) -> None:
    users: dict[int, str] = {}
    for name, layer in layers.items():
        for weight in layer.parameters().values():
            if id(weight) in users:
                raise InputError(f"{users[id(weight)]} and {name} share one weight: plan without them, by exclude.")
            users[id(weight)] = name


def storage(layers: Mapping[str, PlannedLayer], candidates: Candidates) -> dict[str, dict[str, int]]:
    """Bits that an artifact spends on the weights of each layer as each candidate, `[layer][candidate]`.

    Packed codes, scales, zero points and codebooks; in full precision, the weights as they are.

    Raises:
        InputError: if a quantizer does not suit a layer.
    """
    known: dict[tuple[str, torch.Size, torch.dtype], int] = {}

    def bits(layer: PlannedLayer, name: str) -> int:
        total = 0
        for matrix in layer.matrices().values():
            key = (name, matrix.shape, matrix.dtype)
            if key not in known:
                known[key] = _stored(layer.name, matrix, candidates[name])
            total += known[key]
        return total

    return {layer.name: {name: bits(layer, name) for name in candidates} for layer in layers.values()}


def _stored(where: str, matrix: Tensor, candidate: Candidate) -> int:
    """Bits follow from shape and dtype alone, so that no quantizer is fitted for them."""
    if not candidate.quantizes:
        return 8 * matrix.numel() * matrix.element_size()
    quantizer = candidate_quantizer(where, matrix, candidate)
    quantizer.initialized = True
    return stored_bits(quantizer.quantize(torch.zeros_like(matrix)))


def candidate_quantizer(where: str, matrix: Tensor, candidate: Candidate) -> Quantizer:
    """The quantizer that `candidate` makes for a weight of the layer `where`, on its device; not initialized yet.

    Raises:
        InputError: if it does not suit the weight; the layer is named.
    """
    with found_at(f"{where}, weight of shape {list(matrix.shape)}"):
        quantizer = made(candidate.factory, tuple(matrix.shape))
        assert isinstance(quantizer, Quantizer)
        check_weight(quantizer)
    return quantizer.to(matrix.device)
