"""Swap layers: nn.Linear for QuantLinear before training, QuantLinear for PackedLinear after it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from qat.errors import InputError
from qat.nn import PackedLinear, PackedTensor, QuantLinear, StoredActivation
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qat.quantizers import NoQuantizer, Quantizer
from qat.transforms.rules import Rule, Scheme

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


def prepare(model: nn.Module, scheme: Scheme, initialize: bool = True, progress: Progress = _silent) -> nn.Module:
    """Replace the linear layers of `model` by QuantLinear as `scheme` says, in place.

    The Parameters of nn.Linear stay the same objects; GPT-2's Conv1D gets transposed ones first. A Parameter that
    several layers share gets one weight quantizer, shared too.
    Static activation quantizers still need `calibrate`.

    Args:
        initialize: fit the weight quantizers to the weights now; leave out when a checkpoint will be loaded over them.
        progress: called with the number of layers done and their total.

    Returns:
        `model`.

    Raises:
        InputError: if the model has no linear layer, a rule is of no use, a group size does not divide a layer, or
            an activation quantizer could not be stored.
    """
    _conv1d_to_linear(model)
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if "" in linears:
        raise InputError("A lone nn.Linear cannot be replaced in place: wrap it, torch.nn.Sequential(layer).")
    if not linears:
        raise InputError("The model has no linear layer left to quantize; was it prepared already?")
    shared: dict[int, Quantizer | NoQuantizer] = {}
    head = _output_head(model)
    assigned = scheme.assign(linears, next((name for name, linear in linears.items() if linear is head), None))
    for name, rule in assigned.items():
        if not rule.packs:
            raise InputError(f"{name} would get activation quantizers but no weight quantizer: give its rule a weight.")
    swapped: dict[str, QuantLinear] = {}
    for done, (name, rule) in enumerate(assigned.items(), 1):
        linear = linears[name]
        key = id(linear.weight)
        if key not in shared:
            shared[key] = _weight_quantizer(name, linear, rule, initialize)
        swapped[name] = _quant_linear(name, linear, rule, shared[key])
        progress(done, len(assigned))
    # Only now, so that a scheme that is refused leaves the model as it was.
    for name, layer in swapped.items():
        replace(model, name, layer)
    return model


def convert(model: nn.Module) -> nn.Module:
    """Replace every QuantLinear of `model` by a PackedLinear that stores codes, in place.

    Layers that share a weight share its packed codes. The full-precision weights are released.

    Raises:
        InputError: if a layer has no weight quantizer, holds NaN, or has a static one that was never calibrated.
    """
    packed: dict[int, PackedTensor] = {}
    layers = list(quant_linears(model))
    if not layers:
        raise InputError("Nothing to convert: the model has no QuantLinear. Call qat.prepare(model, scheme) first.")
    for name, layer in layers:
        if isinstance(layer.weight_quantizer, NoQuantizer):
            raise InputError(f"{name} has no weight quantizer, so there is nothing to pack; give the scheme a weight.")
        key = id(layer.weight)
        if not torch.isfinite(layer.weight).all():
            raise InputError(f"The weight of {name} holds NaN or infinity, which no grid holds: training diverged.")
        if key not in packed:
            packed[key] = PackedTensor.from_quantized(layer.weight_quantizer.quantize(layer.weight))
        stored = PackedLinear(
            packed[key],
            layer.bias,
            *(_stored(q, layer.weight.device) for q in (layer.input_quantizer, layer.output_quantizer)),
        )
        replace(model, name, stored.train(layer.training))
    return model


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Every QuantLinear of `model` with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _output_head(model: Any) -> nn.Module | None:
    """The layer that transformers calls the output embeddings."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _weight_quantizer(name: str, linear: nn.Linear, rule: Rule, initialize: bool) -> Quantizer | NoQuantizer:
    quantizer: Any = _make(rule.weight, tuple(linear.weight.shape), name, "weight").to(linear.weight.device)
    if initialize and isinstance(quantizer, Quantizer):
        quantizer.initialize(linear.weight)
    return quantizer


def _quant_linear(name: str, linear: nn.Linear, rule: Rule, weight_quantizer: Quantizer | NoQuantizer) -> QuantLinear:
    device = linear.weight.device
    input_quantizer = _activation(rule.input, linear.in_features, name, "input").to(device)
    output_quantizer = _activation(rule.output, linear.out_features, name, "output").to(device)
    return QuantLinear(linear, weight_quantizer, input_quantizer, output_quantizer)


def _activation(factory: Callable[..., nn.Module], features: int, name: str, role: str) -> nn.Module:
    quantizer = _make(factory, (features,), name, role)
    if not isinstance(quantizer, Quantizer):
        return quantizer
    where = f"{name}, {role}"
    if quantizer.rule is None and quantizer.granularity not in (PerTensor(), PerChannel(-1)):
        raise InputError(
            f"{where}: a static or learned quantizer of activations needs granularity per_tensor or "
            f"per_channel_-1, not {quantizer.granularity}; or take a dynamic one (minmax_token)."
        )
    if quantizer.rule is None and quantizer.initialized:
        raise InputError(
            f"{where}: {type(quantizer).__name__} computes its qparams from x but names no rule, so "
            "they cannot be stored. Set its `rule` to one of qat.numerics.dynamic.DYNAMIC_RULES."
        )
    if not _suits_activations(quantizer.granularity):
        raise InputError(
            f"{where}: {quantizer.granularity} would group different texts or tokens of a batch; activations "
            "take per_token, per_tensor, per_channel_-1 or per_group_N."
        )
    if quantizer.initialized:
        _in_context(lambda: StoredActivation.from_quantizer(quantizer), where)
    return quantizer


def _suits_activations(granularity: Granularity) -> bool:
    """Whether its groups lie within a token, or hold everything, or a feature of all tokens."""
    return isinstance(granularity, PerToken | PerTensor | PerGroup) or granularity == PerChannel(-1)


def _make(factory: Callable[..., nn.Module], shape: tuple[int, ...], name: str, role: str) -> nn.Module:
    return _in_context(lambda: factory(shape=shape), f"{name}, {role} of shape {list(shape)}")


def _in_context(work: Callable[[], nn.Module], context: str) -> nn.Module:
    """Do `work`; a mistake names the layer that it was found at."""
    try:
        return work()
    except InputError as error:
        raise InputError(f"{context}: {error}") from error
    except TypeError as error:
        raise InputError(f"{context}: the quantizer refused its options: {error}") from error


def _stored(quantizer: nn.Module, device: torch.device) -> nn.Module:
    return StoredActivation.from_quantizer(quantizer).to(device) if isinstance(quantizer, Quantizer) else nn.Identity()


def _conv1d_to_linear(model: nn.Module) -> None:
    """Replace the transposed linear layers of GPT-2 (`transformers.pytorch_utils.Conv1D`) by nn.Linear."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
            continue
        linear = nn.Linear(module.weight.shape[0], module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), module.weight.requires_grad)
        linear.bias = module.bias
        replace(model, name, linear.train(module.training))
