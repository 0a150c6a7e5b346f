"""A model for tracing: it shares every tensor with the one that is exported, and its quantized layers are placeholders.

The exporter of torch then sees neither codes nor dequantized weights, and needs no memory for them.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.onnx.activations import DynamicActivation, StaticActivation
from qat.nn import PackedLinear, PackedTensor, StoredActivation
from qat.transforms.layers import replace

WEIGHT = "qat::Weight"


class TracedLinear(nn.Module):
    """A linear layer whose weight `[in, out]` is a placeholder.

    Args:
        name: of the layer; it names the weight and the activations.
        layer: whose bias and activations it takes over.
    """

    bias: Tensor | None

    def __init__(self, name: str, layer: PackedLinear) -> None:
        super().__init__()
        self.weight = f"{name}.weight"
        self.shape = (layer.in_features, layer.out_features)
        self.register_buffer("bias", layer.bias)
        self.input_quantizer = _traced(f"{name}.input_quantizer", layer.input_quantizer)
        self.output_quantizer = _traced(f"{name}.output_quantizer", layer.output_quantizer)

    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        weight = torch.onnx.ops.symbolic(
            WEIGHT, (), {"weight": self.weight}, dtype=x.dtype, shape=self.shape, version=1
        )
        y = x @ weight
        return self.output_quantizer(y if self.bias is None else y + self.bias)


def _traced(name: str, role: nn.Module) -> nn.Module:
    if not isinstance(role, StoredActivation):
        return nn.Identity()
    return StaticActivation(name) if role.rule is None else DynamicActivation(role)


class TracedModel(nn.Module):
    """A causal LM from token ids and attention mask, both `[batch, sequence]` int64, to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _twin(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = found.logits
        return logits


def _twin(model: nn.Module) -> nn.Module:
    packed = [module for module in model.modules() if isinstance(module, PackedTensor)]
    shared = [*model.parameters(), *model.buffers(), *packed]
    twin = copy.deepcopy(model, {id(part): part for part in shared})
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            replace(twin, name, TracedLinear(name, layer))
    return twin.eval()
