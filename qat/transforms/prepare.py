"""Before training: swap every layer that a scheme quantizes for one that quantizes as it computes."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from torch import nn

from qat.errors import InputError
from qat.nn import QuantLayer, quant_class
from qat.transforms.build import Shared, quant_layer, suited
from qat.transforms.kv import quantize_kv
from qat.transforms.layers import conv1d_to_linear, kept_layers, plain_layers, replace
from qat.transforms.rules import Rule, Scheme

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def prepare(model: nn.Module, scheme: Scheme, initialize: bool = True, progress: Progress = _silent) -> nn.Module:
    """Replace the layers of `model` that hold weights by ones that quantize as `scheme` says, in place.

    Those are nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d and modules with 3-D weights of experts. Their Parameters
    stay the same objects; GPT-2's Conv1D becomes an nn.Linear with transposed ones first. A Parameter that several
    layers share, such as a tied embedding's, gets one weight quantizer, shared too.
    Static activation quantizers still need `calibrate`. Keys and values are quantized as `quantize_kv` says.

    Args:
        initialize: fit the weight quantizers to the weights now; leave out when a checkpoint will be loaded over them.
        progress: called with the number of layers done and their total.

    Returns:
        `model`.

    Raises:
        InputError: if the model has nothing to quantize, a rule is of no use, a group size does not divide a layer, a
            quantizer does not suit what it is for, or only some of the layers that share a weight would quantize it.
    """
    conv1d_to_linear(model)
    layers = plain_layers(model)
    if "" in layers:
        raise InputError(f"A lone {type(model).__name__} cannot be replaced: wrap it, torch.nn.Sequential(layer).")
    kept = kept_layers(model, layers, scheme)
    if not layers.keys() - kept.keys():
        raise InputError(_nothing_left(kept))
    if scheme.embedding and not any(isinstance(layer, nn.Embedding) for layer in layers.values()):
        raise InputError("scheme.embedding=true, but the model has no nn.Embedding: set scheme.embedding=false.")
    rules = _rules(layers, kept, scheme)
    _check_shared(layers, rules)
    shared: Shared = {}
    swapped: dict[str, QuantLayer] = {}
    for done, (name, rule) in enumerate(rules.items(), 1):
        swapped[name] = quant_layer(name, layers[name], _kind(layers[name]), rule, shared, initialize)
        progress(done, len(rules))
    # Only now, so that a scheme that is refused leaves the model as it was.
    if scheme.kv is not None:
        quantize_kv(model, scheme.kv.key, scheme.kv.value, scheme.kv.window)
    for name, layer in swapped.items():
        replace(model, name, layer)
    return model


def _nothing_left(kept: Mapping[str, str]) -> str:
    only = f" It has only {next(iter(kept.values()))}." if kept else ""
    return f"The model has no layer left to quantize; was it prepared already?{only}"


def _kind(layer: nn.Module) -> type[QuantLayer]:
    kind = quant_class(layer)
    assert kind is not None
    return kind


def _rules(layers: Mapping[str, nn.Module], kept: Mapping[str, str], scheme: Scheme) -> dict[str, Rule]:
    """The rule of every layer that is to be quantized, without what the layer has no use for."""
    found = {}
    for name, rule in scheme.assign(layers, kept).items():
        takes_activations = not isinstance(layers[name], nn.Embedding)
        found[name] = suited(name, takes_activations, rule, explicit=rule != scheme.default)
    return {name: rule for name, rule in found.items() if rule.quantizes}


def _check_shared(layers: Mapping[str, nn.Module], rules: Mapping[str, Rule]) -> None:
    """Refuse to quantize a weight in one layer and not in another: it would be stored twice, and drift apart."""
    users: dict[int, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        for parameter_name in _kind(layer).names(layer):
            users[id(getattr(layer, parameter_name))].append(name)
    for names in users.values():
        packed = [name for name in names if name in rules and rules[name].packs]
        full = [name for name in names if name not in packed]
        if packed and full:
            raise InputError(
                f"{packed[0]} and {full[0]} share one weight, and the scheme quantizes it only in {packed[0]}: "
                "exclude both, or neither."
            )
