"""Quantize the KV cache: put quantizers into the attention layers, and what they store into the artifact."""

from collections.abc import Mapping
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import nn

from qat.errors import InputError
from qat.nn.activation import StoredActivation
from qat.nn.kv_quantizer import KVQuantizer, kv_layers, tokens_of_group
from qat.quantizers import NoQuantizer, Quantizer
from qat.transforms.build import found_at, made
from qat.transforms.roles import check_cached
from qat.transforms.rules import KVCache, QuantizerFactory

_UNSUPPORTED = "Leave its cache in full precision (kv@scheme.kv=none), or take a model with full causal attention."


def quantize_kv(
    model: nn.Module, key: QuantizerFactory = NoQuantizer, value: QuantizerFactory = NoQuantizer, window: int = 0
) -> nn.Module:
    """Quantize the keys and values of every attention layer of a transformers model, in place.

    Training sees exactly what the cache will store, and `model.generate` stores it: see `KVQuantizer` for the layouts
    and `Schedule` for who sees what. Static quantizers still need `calibrate`.

    Args:
        key, value: make the quantizers, called with `shape=(0, head_dim)`, because no token is known yet.
        window: the number of latest tokens that stay in full precision.

    Returns:
        `model`; unchanged if neither keys nor values get a quantizer.

    Raises:
        InputError: if the window is no number of tokens, the model has no attention of the supported kind, a layout
            would let a token's scale depend on later tokens, or it does not fit head_dim.
    """
    if not KVCache(key, value, window).quantizes:
        return model
    installed = {}
    for name, module in _attention_layers(model).items():
        made = _make(key, module, f"{name}, keys"), _make(value, module, f"{name}, values")
        installed[name] = KVQuantizer(made[0], made[1], window).to(_device(module))
    _install(model, installed)
    return model


def store_kv(model: nn.Module) -> nn.Module:
    """Replace every KV quantizer by the StoredActivation that computes the same, in place; after training.

    Raises:
        InputError: if a static one was never calibrated.
    """
    for _, module, kv in kv_layers(model):
        device = _device(module)
        for role in ("key_quantizer", "value_quantizer"):
            quantizer = getattr(kv, role)
            if isinstance(quantizer, Quantizer):
                setattr(kv, role, StoredActivation.from_quantizer(quantizer).to(device))
            elif isinstance(quantizer, NoQuantizer):
                setattr(kv, role, nn.Identity())
    return model


def describe_kv(model: nn.Module) -> dict[str, Any] | None:
    """What an artifact's JSON says of the KV cache; None if it is in full precision.

    `{"window": tokens, "layers": {name: {"key": description or None, "value": ...}}}`, with the descriptions of
    StoredActivation. The tensors are part of the model's state dict.

    Raises:
        InputError: if `store_kv` did not run.
    """
    layers: dict[str, Any] = {}
    window = 0
    for name, _, kv in kv_layers(model):
        if any(isinstance(role, Quantizer) for role in kv.children()):
            raise InputError(f"The KV quantizers of {name} are still trained: call store_kv(model) first.")
        layers[name] = {"key": _description(kv.key_quantizer), "value": _description(kv.value_quantizer)}
        window = kv.window
    return {"window": window, "layers": layers} if layers else None


def restore_kv(model: nn.Module, description: Mapping[str, Any] | None) -> nn.Module:
    """Install what `describe_kv` described; the tensors are allocated here and filled by `load_state_dict`.

    Raises:
        InputError: if the model does not have the described attention layers.
    """
    if description is None:
        return model
    attentions = _attention_layers(model)
    if set(attentions) != set(description["layers"]):
        raise InputError("The stored KV quantizers belong to other attention layers than this model has: export anew.")
    installed = {
        name: KVQuantizer(_restored(roles["key"]), _restored(roles["value"]), description["window"])
        for name, roles in description["layers"].items()
    }
    _install(model, installed)
    return model


def _install(model: Any, installed: Mapping[str, KVQuantizer]) -> None:
    from qat.nn.attention import PREFIX, register
    from qat.nn.kv_cache import use_quantized_cache

    register()
    decoder = _decoder(model, [model.get_submodule(name) for name in installed])
    model.set_attn_implementation(PREFIX + _implementation(model))
    if not all(model.get_submodule(name).config._attn_implementation.startswith(PREFIX) for name in installed):
        raise InputError(f"{type(model).__name__} keeps its own attention implementation. {_UNSUPPORTED}")
    for name, kv in installed.items():
        model.get_submodule(name).kv_quantizer = kv.train(model.training)
    if use_quantized_cache not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(use_quantized_cache, with_kwargs=True)


def _attention_layers(model: Any) -> dict[str, Any]:
    """The self-attention layers of `model` by name, after checking that all of them can be quantized."""
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{type(model).__name__} does not use the attention interface of transformers. {_UNSUPPORTED}")
    if next(kv_layers(model), None) is not None:
        raise InputError("The model has KV quantizers already: quantize a freshly loaded one.")
    _implementation(model)
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise InputError(f"{type(model).__name__} has cross-attention, whose cache is not quantized. {_UNSUPPORTED}")
    _check_full_attention(type(model).__name__, config)
    found = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    }
    if len(found) != config.num_hidden_layers or any(hasattr(module, "kv_lora_rank") for module in found.values()):
        raise InputError(f"{type(model).__name__} has layers without an own KV cache of each head. {_UNSUPPORTED}")
    return found


def _check_full_attention(model: str, config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        kinds = ["full_attention" if all(limit is None for limit in limits) else "sliding_attention"]
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise InputError(f"{model} has layers of {', '.join(others)}, whose cache is not quantized. {_UNSUPPORTED}")


def _implementation(model: Any) -> str:
    from qat.nn.attention import PREFIX, SUPPORTED

    name: str = (model.config._attn_implementation or "eager").removeprefix(PREFIX)
    if name not in SUPPORTED:
        raise InputError(
            f"A quantized KV cache does not work with attention implementation {name}: set model.attention=sdpa."
        )
    return name


def _decoder(model: nn.Module, attentions: list[nn.Module]) -> nn.Module:
    """The innermost model that takes a cache and holds all attention layers."""
    from transformers import PreTrainedModel

    for module in reversed(list(model.modules())):
        if isinstance(module, PreTrainedModel) and "past_key_values" in signature(module.forward).parameters:
            inside = set(module.modules())
            if all(attention in inside for attention in attentions):
                return module
    raise InputError(f"{type(model).__name__} takes no past_key_values. {_UNSUPPORTED}")


def _make(factory: QuantizerFactory, module: Any, where: str) -> nn.Module:
    features = _head_dim(module)
    with found_at(f"{where} of head_dim {features}"):
        quantizer = made(factory, (0, features))
        if isinstance(quantizer, Quantizer):
            # One group of tokens, for who asks for an example of what is quantized.
            quantizer.shape = (tokens_of_group(quantizer), features)
            check_cached(quantizer)
    return quantizer


def _head_dim(module: Any) -> int:
    config = module.config
    found = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _device(module: nn.Module) -> torch.device:
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _description(role: nn.Module) -> dict[str, Any] | None:
    return role.description if isinstance(role, StoredActivation) else None


def _restored(description: dict[str, Any] | None) -> nn.Module:
    return nn.Identity() if description is None else StoredActivation(description)
