"""Build the quantizers that a rule names for one layer; refuse those that could not do their work there."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qat.errors import InputError
from qat.nn import LayerQuantizers, LowBitLinear, QuantLayer, QuantLinear
from qat.quantizers import NoQuantizer, Quantizer
from qat.transforms.roles import check_activation, check_gradient, check_weight
from qat.transforms.rules import QuantizerFactory, Rule, given

# The weight quantizer of every Parameter, by the Parameter's id.
Shared = MutableMapping[int, Quantizer | NoQuantizer]


def suited(name: str, takes_activations: bool, rule: Rule, explicit: bool) -> Rule:
    """What of `rule` the layer `name` can use: a layer whose input holds indices takes no `input` and no `grad`.

    Raises:
        InputError: if an `explicit` rule gives it one, or activations would be quantized without a weight.
    """
    if not takes_activations:
        if explicit and (given(rule.input) or given(rule.grad) or rule.compute != "fake"):
            raise InputError(
                f"{name} is an embedding: its input holds indices and it multiplies nothing, so it takes no input and "
                "no grad quantizer, and no compute. Leave them out of its rule, or match it by a rule of its own."
            )
        rule = replace(rule, input=NoQuantizer, grad=NoQuantizer, compute="fake", products=("forward",))
    if rule.quantizes_activations and not rule.packs:
        raise InputError(f"{name} would get activation quantizers but no weight quantizer: give its rule a weight.")
    return rule


def quant_layer(
    name: str, module: nn.Module, kind: type[QuantLayer], rule: Rule, shared: Shared, initialize: bool
) -> QuantLayer:
    """The layer that takes the place of `module`; a Parameter in `shared` keeps the weight quantizer it has there."""
    weights = {}
    for parameter_name in kind.names(module):
        parameter = getattr(module, parameter_name)
        if id(parameter) not in shared:
            label = name if parameter_name == "weight" else f"{name}.{parameter_name}"
            matrix = kind.matrix(module, parameter_name)
            shared[id(parameter)] = _weight_quantizer(label, matrix, rule.weight, initialize)
        weights[parameter_name] = shared[id(parameter)]
    features_in, features_out = kind.features(module)
    quantizers = LayerQuantizers(
        weights,
        NoQuantizer() if features_in is None else _make(rule.input, (features_in,), f"{name}, input", check_activation),
        _make(rule.output, (features_out,), f"{name}, output", check_activation),
        _make(rule.grad, (features_out,), f"{name}, grad", check_gradient),
    )
    for quantizer in quantizers[1:]:
        quantizer.to(parameter.device)
    with found_at(name):
        return _layer(module, kind, quantizers, rule)


def _layer(module: Any, kind: type[QuantLayer], quantizers: LayerQuantizers, rule: Rule) -> QuantLayer:
    if rule.compute == "fake":
        return kind(module, quantizers)
    if kind is not QuantLinear:
        raise InputError(
            f"compute={rule.compute} is for nn.Linear, not {type(module).__name__}: give it a rule of its own with "
            "compute=fake, or exclude it."
        )
    return LowBitLinear(module, quantizers, rule.compute, rule.products)


def _weight_quantizer(
    name: str, matrix: Tensor, factory: QuantizerFactory, initialize: bool
) -> Quantizer | NoQuantizer:
    quantizer: Any = _make(factory, tuple(matrix.shape), f"{name}, weight", check_weight).to(matrix.device)
    if initialize and isinstance(quantizer, Quantizer):
        quantizer.initialize(matrix)
    return quantizer


def _make(
    factory: QuantizerFactory, shape: tuple[int, ...], where: str, check: Callable[[Quantizer], None]
) -> nn.Module:
    with found_at(f"{where} of shape {list(shape)}"):
        quantizer = made(factory, shape)
        if isinstance(quantizer, Quantizer):
            check(quantizer)
    return quantizer


def made(factory: QuantizerFactory, shape: tuple[int, ...]) -> nn.Module:
    """The quantizer that `factory` makes for a tensor of `shape`.

    Raises:
        InputError: if it refuses its options.
    """
    if factory is None:
        return NoQuantizer()
    if not callable(factory):
        raise InputError(
            f"{factory!r} is no quantizer: choose one by its group, as in quantizer@scheme.weight={factory}."
        )
    try:
        return factory(shape=shape)
    except TypeError as error:
        raise InputError(f"the quantizer refused its options: {error}") from error


@contextmanager
def found_at(where: str) -> Iterator[None]:
    """A mistake found within names `where`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
