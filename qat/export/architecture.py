"""The architecture that a folder's `config.json` names, without weights, and filling it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.export.tensor_files import TensorFiles
from qat.transforms.layers import is_transposed

# Beyond every model there is.
_MOST_BLOCKS = 4096


def empty_model(
    folder: Path, trust_remote_code: bool = False, attention: str | None = None, experts: str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the causal LM of `folder` on the meta device; buffers that are computed, not stored, are real.

    Args:
        folder: holds `config.json`.
        trust_remote_code: run model code that it names.
        attention, experts: implementations of transformers; None for the model's own choice.

    Returns:
        The model, and its `quantization_config`, empty if there is none, which the model's own config does not keep.

    Raises:
        InputError: if there is no usable `config.json`.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises of every kind
        raise InputError(
            f"{folder} holds no usable config.json ({error}); pass the architecture as `model`."
        ) from error
    _check_count(folder, config)
    quantization = getattr(config, "quantization_config", {})
    if quantization:
        del config.quantization_config
    if experts is not None:
        config._experts_implementation = experts  # the one that trained: others sum in another order
    return empty_from(config, trust_remote_code, attention), quantization


def empty_from(config: Any, trust_remote_code: bool = False, attention: str | None = None) -> nn.Module:
    """Build the causal LM of a configuration, as `empty_model` does."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return model


def _check_count(folder: Path, config: Any) -> None:
    """Refuse a number of blocks that would take forever to build."""
    blocks = getattr(config, "num_hidden_layers", 0)
    if blocks > _MOST_BLOCKS:
        raise InputError(f"{folder} has {blocks} blocks by its config.json, which is damaged: at most {_MOST_BLOCKS}.")


def transposed_layers(model: Any) -> set[str]:
    """The linear layers of `model` whose weight transformers stores transposed, whatever they were replaced by."""
    if not hasattr(model, "config"):
        return set()
    with torch.device("meta"):
        twin = type(model)(model.config)
    return {name for name, module in twin.named_modules() if is_transposed(module)}


def fill(model: Any, files: TensorFiles, transposed: set[str]) -> None:
    """Give every Parameter and stored buffer of `model` that is on the meta device its tensor of `files`.

    Raises:
        InputError: where one is missing or of another shape.
    """
    owners: Mapping[str, nn.Module] = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta":
            continue
        path, _, leaf = name.rpartition(".")
        if name in files:
            _put(owners[path], leaf, _read(files, name, path in transposed and leaf == "weight", tensor))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if missing:
        raise InputError(f"{files.folder} lacks {len(missing)} of the model's tensors, {missing[0]} among them.")


def _read(files: TensorFiles, name: str, transposed: bool, expected: Tensor) -> Tensor:
    found = files[name].t().contiguous() if transposed else files[name]
    if found.shape != expected.shape:
        raise InputError(f"{name} is {list(found.shape)}, and its config.json says {list(expected.shape)}.")
    if expected.is_floating_point() and found.dtype.itemsize == 1:
        raise InputError(f"{name} is {found.dtype}, which are codes, and the checkpoint has no scales for them.")
    return found.to(expected.dtype)


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(tensor, tensor.is_floating_point()))
    else:
        setattr(owner, leaf, tensor)
