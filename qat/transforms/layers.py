"""Which layers of a model can be quantized, which of them stay in full precision, and how one is replaced."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from qat.nn import PackedLayer, QuantLayer, quant_class
from qat.nn.experts import is_experts
from qat.nn.kv_quantizer import kv_layers
from qat.quantizers import KMeansQuantizer, Quantizer
from qat.transforms.rules import Scheme


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Every layer of `model` that quantizes, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


class QuantizedWeight(NamedTuple):
    """A weight that has codes.

    label: the full name of its Parameter, in the first layer that uses it.
    layer: that layer.
    name: of the Parameter there.
    quantizer: its own, which all layers that share the weight use.
    """

    label: str
    layer: QuantLayer
    name: str
    quantizer: Quantizer

    @property
    def parameter(self) -> nn.Parameter:
        """The weight in full precision."""
        return self.layer.get_parameter(self.name)

    @property
    def matrix(self) -> Tensor:
        """The weight as `[rows, columns]`, without a graph."""
        return self.layer.matrix(self.layer, self.name).detach()


def quantized_weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """Every weight of `model` that has codes; shared ones once."""
    seen: set[int] = set()
    for label, layer in quant_layers(model):
        for name in layer.names(layer):
            quantizer = getattr(layer, f"{name}_quantizer")
            if isinstance(quantizer, Quantizer) and id(quantizer) not in seen:
                seen.add(id(quantizer))
                yield QuantizedWeight(f"{label}.{name}", layer, name, quantizer)


def codebooks(model: nn.Module) -> Iterator[tuple[QuantLayer, str, KMeansQuantizer]]:
    """Every layer of `model` with a learned codebook, the name of the weight and its quantizer; shared ones once."""
    for weight in quantized_weights(model):
        if isinstance(weight.quantizer, KMeansQuantizer):
            yield weight.layer, weight.name, weight.quantizer


def quantizes_weights(model: nn.Module) -> bool:
    """Whether a weight of `model` has codes, or gets them when converted; quantized gradients alone leave it full."""
    return any(isinstance(m, PackedLayer) or (isinstance(m, QuantLayer) and m.packs) for m in model.modules())


def is_quantized(model: nn.Module) -> bool:
    """Whether `model` computes or stores something with codes: weights, or keys and values."""
    return quantizes_weights(model) or next(kv_layers(model), None) is not None


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of `model` that can be quantized and is not yet, by name."""
    return {name: module for name, module in model.named_modules() if quant_class(module) is not None}


def kept_layers(model: nn.Module, layers: Mapping[str, nn.Module], scheme: Scheme) -> dict[str, str]:
    """Those of `layers` that stay in full precision whatever the rules say, each with the reason.

    They are the output head and embeddings, unless the scheme wants them, and the routers of experts.
    """
    head = next((name for name, layer in layers.items() if layer is output_head(model)), None)
    embeddings = [name for name, layer in layers.items() if isinstance(layer, nn.Embedding)]
    tied = [] if head is None else [e for e in embeddings if layers[e].weight is layers[head].weight]
    either = scheme.head or scheme.embedding
    kept = {}
    if head is not None and not (either if tied else scheme.head):
        kept[head] = f"the output head {head}, which stays in full precision unless scheme.head=true"
    for name in embeddings:
        if not (either if name in tied else scheme.embedding):
            kept[name] = f"the embedding {name}, which stays in full precision unless scheme.embedding=true"
    for name in _routers(model, layers):
        kept[name] = f"the router {name}, which stays in full precision"
    return kept


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def is_transposed(module: Any) -> bool:
    """Whether it is a linear layer of GPT-2 (`transformers.pytorch_utils.Conv1D`), whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def conv1d_to_linear(model: nn.Module) -> None:
    """Replace the transposed linear layers of GPT-2 by nn.Linear."""
    for name, module in list(model.named_modules()):
        if not is_transposed(module):
            continue
        linear = nn.Linear(module.weight.shape[0], module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), module.weight.requires_grad)
        linear.bias = module.bias
        replace(model, name, linear.train(module.training))


def output_head(model: Any) -> nn.Module | None:
    """The layer that transformers calls the output embeddings."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _routers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Linear layers beside experts that choose among them, or weigh one: an output for each expert, or one alone."""
    blocks = {name.rpartition(".")[0]: count for name, m in model.named_modules() if (count := _expert_count(name, m))}
    return [
        name
        for name, layer in layers.items()
        for block, count in blocks.items()
        if isinstance(layer, nn.Linear) and name.startswith(f"{block}." if block else "")
        if layer.out_features in (1, count)
    ]


def _expert_count(name: str, module: nn.Module) -> int:
    if is_experts(module):
        return int(module.num_experts)  # type: ignore[arg-type]
    return len(module) if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts" else 0
