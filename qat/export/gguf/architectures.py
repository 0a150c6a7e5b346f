"""The architectures of llama.cpp that are written and read: what their metadata say, and how tensors are called.

Keys and values are those of `convert_hf_to_gguf.py` of llama.cpp; names of tensors come from the package `gguf`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from torch import Tensor

from qat.errors import InputError
from qat.export.gguf.file import GgufFile
from qat.export.gguf.rope import rope_metadata, rope_of

Metadata = dict[str, Any]

_HIDDEN = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_LLAMA = _HIDDEN | {
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
_SILU = {"hidden_act": ("silu",), "sliding_window": (None,)}
_GELU = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


@dataclass(frozen=True)
class Architecture:
    """One that llama.cpp computes.

    Attributes:
        name: as llama.cpp calls it.
        model_types: of transformers, that compute the same; the first is what a file alone is taken for.
        keys: the attribute of the configuration behind each key of the metadata.
        settings: the only values that llama.cpp computes with.
        permuted: layers whose rows it takes in another order, each with the attribute that says the number of heads.
        biases: attributes that say whether there are biases, each with one of these.
        rotary: whether positions are rotations.
    """

    name: str
    model_types: tuple[str, ...]
    keys: Mapping[str, str]
    settings: Mapping[str, tuple[Any, ...]]
    permuted: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    rotary: bool = True

    def check(self, config: Any) -> None:
        """Refuse a configuration that llama.cpp would compute something else of.

        Raises:
            InputError: if so.
        """
        for attribute, values in self.settings.items():
            value = getattr(config, attribute, values[0])
            if value not in values:
                raise InputError(
                    f"GGUF cannot hold this model: llama.cpp computes {self.name} with {attribute}={values[0]}, and it "
                    f"has {value}. Take export=native."
                )
        if self.rotary:
            rope_metadata(config)

    def metadata(self, config: Any) -> Metadata:
        """What a file says of the model's shape, without the prefix `llama.`."""
        found = {key: getattr(config, attribute, None) for key, attribute in self.keys.items()}
        if not self.rotary:
            found["feed_forward_length"] = config.n_inner or 4 * config.n_embd
        rope = rope_metadata(config) if self.rotary else {}
        return {key: value for key, value in (found | rope).items() if value is not None}

    def config(self, file: GgufFile) -> Any:
        """The configuration that a file without a `config.json` beside it stands for.

        Raises:
            InputError: if its metadata say too little.
        """
        from transformers import AutoConfig

        said = {key.removeprefix(f"{self.name}."): value for key, value in file.metadata.items()}
        _check_sizes(file, said)
        options = {attribute: said[key] for key, attribute in self.keys.items() if key in said}
        options |= {name: file.metadata.get(f"tokenizer.ggml.{key}") for key, name in _IDS.items()}
        options["vocab_size"] = file.entries["token_embd.weight"].shape[0]
        options["tie_word_embeddings"] = "output.weight" not in file.entries
        options |= {attribute: bias in file.entries for attribute, bias in self.biases.items()}
        if self.rotary:
            options["rope_parameters"] = rope_of(said, file)
        else:
            options["n_inner"] = said.get("feed_forward_length")
        try:
            return AutoConfig.for_model(self.model_types[0], **options)
        except Exception as error:  # whatever transformers makes of numbers that nobody checked
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{file.path} says what no {self.name} is like ({reason}): it is damaged.") from error


_HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
_BIAS = {"attention_bias": "blk.0.attn_output.bias"}
_ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), _LLAMA, _SILU, _HEADS, _BIAS | {"mlp_bias": "blk.0.ffn_gate.bias"}),
    Architecture("qwen2", ("qwen2",), _LLAMA, _SILU),
    Architecture("qwen3", ("qwen3",), _LLAMA, _SILU, biases=_BIAS),
    Architecture(
        "gpt2", ("gpt2",), _HIDDEN | {"attention.layer_norm_epsilon": "layer_norm_epsilon"}, _GELU, rotary=False
    ),
)


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model of transformers.

    Raises:
        InputError: if it is none that is written.
    """
    kind = getattr(config, "model_type", None)
    for architecture in _ARCHITECTURES:
        if kind in architecture.model_types:
            return architecture
    known = ", ".join(kind for architecture in _ARCHITECTURES for kind in architecture.model_types)
    raise InputError(f"GGUF is written of {known}, and this is a model of the type {kind}: take export=native.")


def architecture_named(file: GgufFile) -> Architecture:
    """The architecture that `file` names.

    Raises:
        InputError: if it is none that is read.
    """
    name = file.metadata.get("general.architecture")
    for architecture in _ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in _ARCHITECTURES)
    raise InputError(f"{file.path} is a model of the architecture {name}: {known} are read.")


class Names:
    """The tensors of a model as llama.cpp calls and orders them."""

    def __init__(self, architecture: Architecture, config: Any) -> None:
        self._architecture = architecture
        self._config = config

    @cached_property
    def _map(self) -> TensorNameMap:
        (arch,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == self._architecture.name)
        return get_tensor_name_map(arch, self._config.num_hidden_layers)

    def of(self, module: str, leaf: str) -> str:
        """The name of a tensor, `leaf` being `weight` or `bias`.

        Raises:
            InputError: if llama.cpp has no such tensor.
        """
        found = self._map.get_name(module)
        if found is None:
            raise InputError(f"GGUF has no place for {module}.{leaf} in the architecture {self._architecture.name}.")
        return f"{found}.{leaf}"

    def order(self, module: str, rows: int) -> Tensor | None:
        """Which row of the model each row of the file is; None where rows keep their order.

        llama.cpp rotates neighbours, transformers the halves of a head: so a head's rows 0, d/2, 1, d/2 + 1, ... follow
        each other in the file.
        """
        for layer, attribute in self._architecture.permuted.items():
            if module.endswith(layer):
                heads = getattr(self._config, attribute)
                return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
        return None


def _check_sizes(file: GgufFile, said: Metadata) -> None:
    """Refuse sizes that tensors do not have, before a model is built of them.

    Raises:
        InputError: if there are such.
    """
    embedding = file.entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file.path} has no matrix token_embd.weight: it holds no language model.")
    positions = file.entries.get("position_embd.weight")
    found = {
        "embedding_length": embedding.shape[1],
        "block_count": len({name.split(".")[1] for name in file.entries if name.startswith("blk.")}),
        "context_length": said.get("context_length") if positions is None else positions.shape[0],
    }
    for key, size in found.items():
        if said.get(key) != size:
            raise InputError(f"{file.path} is damaged: it says that its {key} is {said.get(key)}, and it is {size}.")
    heads, width = said.get("attention.head_count"), said.get("attention.key_length", 1)
    if not isinstance(heads, int) or not isinstance(width, int) or not 0 < heads * width <= file.size:
        raise InputError(f"{file.path} is damaged: it says that it has {heads} heads of {width}.")
