"""Build the quantizers that a rule names for one layer; refuse those that could not do their work there."""

from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qat.errors import InputError
from qat.nn import LayerQuantizers, QuantLayer, StoredActivation
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.quantizers import NoQuantizer, Quantizer
from qat.transforms.rules import QuantizerFactory, Rule

# The weight quantizer of every Parameter, by the Parameter's id.
Shared = MutableMapping[int, Quantizer | NoQuantizer]


def suited(name: str, takes_activations: bool, rule: Rule, explicit: bool) -> Rule:
    """What of `rule` the layer `name` can use: a layer whose input holds indices takes no `input` and no `grad`.

    Raises:
        InputError: if an `explicit` rule gives it one, or activations would be quantized without a weight.
    """
    if not takes_activations:
        usable = replace(rule, input=NoQuantizer, grad=NoQuantizer)
        if explicit and usable != rule:
            raise InputError(
                f"{name} is an embedding: its input holds indices and it multiplies nothing, so it takes no input and "
                "no grad quantizer. Leave them out of its rule, or match it by a rule of its own."
            )
        rule = usable
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
        NoQuantizer() if features_in is None else _activation(rule.input, features_in, name, "input"),
        _activation(rule.output, features_out, name, "output"),
        _gradient(rule.grad, features_out, name),
    )
    for quantizer in quantizers[1:]:
        quantizer.to(parameter.device)
    return in_context(lambda: kind(module, quantizers), name)


def _weight_quantizer(
    name: str, matrix: Tensor, factory: QuantizerFactory, initialize: bool
) -> Quantizer | NoQuantizer:
    quantizer: Any = _make(factory, tuple(matrix.shape), name, "weight").to(matrix.device)
    if initialize and isinstance(quantizer, Quantizer):
        quantizer.initialize(matrix)
    return quantizer


def _activation(factory: QuantizerFactory, features: int, name: str, role: str) -> nn.Module:
    quantizer = _make(factory, (features,), name, role)
    if not isinstance(quantizer, Quantizer):
        return quantizer
    where = f"{name}, {role}"
    in_context(lambda: check_storable(quantizer, "activations"), where)
    if not _suits_activations(quantizer):
        raise InputError(
            f"{where}: {quantizer.granularity} would group different texts or tokens of a batch, and a token served "
            "alone would see another scale; activations take per_token, per_tensor or per_group_N, static ones "
            "per_channel_-1 too."
        )
    if quantizer.initialized:
        in_context(lambda: StoredActivation.from_quantizer(quantizer), where)
    return quantizer


def check_storable(quantizer: Quantizer, what: str) -> None:
    """Refuse a quantizer whose qparams for `what` follow neither from stored numbers nor from a rule with a name."""
    if quantizer.rule is None and quantizer.initialized:
        raise InputError(
            f"{type(quantizer).__name__} is for weights: no stored numbers and no rule say how to quantize {what} "
            "later. Take minmax_token, fp8_token or mxfp4; a quantizer of your own needs a `rule`."
        )
    if quantizer.rule is None and quantizer.granularity not in (PerTensor(), PerChannel(-1)):
        raise InputError(
            f"a static or learned quantizer of {what} needs granularity per_tensor or per_channel_-1, not "
            f"{quantizer.granularity}; or take a dynamic one (minmax_token)."
        )


def _suits_activations(quantizer: Quantizer) -> bool:
    """Whether each group lies within a token, or is everything, or with a fixed scale a feature of all tokens.

    A dynamic scale per_tensor depends on what else is in the batch, too; it is what many engines serve.
    """
    granularity = quantizer.granularity
    whole = isinstance(granularity, PerToken | PerTensor | PerGroup)
    return whole or (granularity == PerChannel(-1) and quantizer.rule is None)


def _gradient(factory: QuantizerFactory, features: int, name: str) -> nn.Module:
    quantizer = _make(factory, (features,), name, "grad")
    if not isinstance(quantizer, Quantizer):
        return quantizer
    if not quantizer.initialized or any(True for _ in quantizer.parameters()):
        raise InputError(
            f"{name}, grad: a static or learned quantizer cannot follow gradients, which shrink as training goes on: "
            "take a dynamic one (grad_token)."
        )
    if not isinstance(quantizer.granularity, PerToken | PerTensor | PerGroup):
        raise InputError(
            f"{name}, grad: gradients take per_token, per_tensor or per_group_N, not {quantizer.granularity}."
        )
    return quantizer


def _make(factory: Callable[..., nn.Module], shape: tuple[int, ...], name: str, role: str) -> nn.Module:
    def make() -> nn.Module:
        if not callable(factory):
            raise InputError(f"{factory!r} is no quantizer: choose one by quantizer@scheme.{role}={factory}.")
        quantizer = factory(shape=shape)
        check_role(quantizer, role)
        return quantizer

    made: nn.Module = in_context(make, f"{name}, {role} of shape {list(shape)}")
    return made


def check_role(quantizer: nn.Module, role: str) -> None:
    """Refuse what serves only gradients, or only weights, in another role."""
    if not isinstance(quantizer, Quantizer):
        return
    if quantizer.stochastic and role != "grad":
        raise InputError(
            "random rounding is for gradients, and would ship other codes than it trained: set rounding=nearest."
        )
    if quantizer.format.block > 1 and role != "weight":
        raise InputError(
            f"{quantizer.format.name} has one code for several numbers and is for weights: take kmeans or nf4."
        )


def in_context(work: Callable[[], Any], context: str) -> Any:
    """Do `work`; a mistake names the layer that it was found at."""
    try:
        return work()
    except InputError as error:
        raise InputError(f"{context}: {error}") from error
    except TypeError as error:
        raise InputError(f"{context}: the quantizer refused its options: {error}") from error
