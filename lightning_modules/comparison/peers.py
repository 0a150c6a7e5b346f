"""Quantization-aware training by other libraries, on the same tokens, order and steps."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from lightning_modules.pipeline import Job
from qat.errors import InputError
from qat.numerics.formats import IntFormat
from qat.numerics.granularity import PerChannel, PerGroup, PerToken
from qat.quantizers import NoQuantizer, Quantizer
from qat.transforms import Scheme, prepare, quant_layers
from qat.transforms.rules import given


class TorchaoJob(Job):
    """A run of `method=fp` whose linear layers torchao fake-quantizes as `scheme` would.

    torchao finds scales from the extremes. Inputs have a zero point for every token, because it offers no other.

    Args:
        cfg: of a run without quantization.
        scheme: what is quantized, and in which format.
    """

    def __init__(self, cfg: DictConfig, scheme: Scheme) -> None:
        super().__init__(cfg)
        self._scheme = scheme

    def _prepare(self) -> None:
        super()._prepare()
        fake_quantize_by_torchao(self.model, self._scheme)


# Peers by the name of their arm and their package.
PEERS: dict[str, Callable[[DictConfig, Scheme], Job]] = {"torchao": TorchaoJob}


def installed(name: str) -> bool:
    """Whether the peer `name` can take part."""
    return importlib.util.find_spec(name) is not None


def fake_quantize_by_torchao(model: Any, scheme: Scheme) -> None:
    """Let torchao fake-quantize, in place, the linear layers of `model` that `scheme` quantizes.

    Raises:
        InputError: if torchao has no such layer or format.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    if scheme.kv is not None and (given(scheme.kv.key) or given(scheme.kv.value)):
        raise InputError("torchao fake-quantizes no KV cache.")
    with torch.device("meta"):
        shadow = type(model)(model.config)
    prepare(shadow, scheme, initialize=False)
    for name, layer in quant_layers(shadow):
        if not isinstance(layer, nn.Linear):
            raise InputError(f"torchao's arm fake-quantizes linear layers, and {name} is another.")
        weights, inputs = _weights(layer.weight_quantizer), _inputs(layer.input_quantizer)
        config = QATConfig(weight_config=weights, activation_config=inputs, step="prepare")
        quantize_(model, config, filter_fn=lambda _, other, own=name: other == own)


def _weights(quantizer: nn.Module) -> Any:
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    if isinstance(quantizer, NoQuantizer):
        return None
    assert isinstance(quantizer, Quantizer)
    format, granularity = quantizer.format, quantizer.granularity
    if not isinstance(format, IntFormat) or not isinstance(granularity, PerGroup | PerChannel):
        raise InputError(f"torchao has no fake quantization of weights to {format.name} {granularity}.")
    shared = (
        {"group_size": granularity.group_size} if isinstance(granularity, PerGroup) else {"granularity": "per_channel"}
    )
    return IntxFakeQuantizeConfig(getattr(torch, f"int{format.width}"), is_symmetric=format.signed, **shared)


def _inputs(quantizer: nn.Module) -> Any:
    from torchao.quantization.qat import IntxFakeQuantizeConfig

    if isinstance(quantizer, NoQuantizer):
        return None
    assert isinstance(quantizer, Quantizer)
    format, granularity = quantizer.format, quantizer.granularity
    if not isinstance(format, IntFormat) or not isinstance(granularity, PerToken):
        raise InputError(f"torchao has no fake quantization of inputs to {format.name} {granularity}.")
    return IntxFakeQuantizeConfig(getattr(torch, f"int{format.width}"), "per_token", is_symmetric=False)
