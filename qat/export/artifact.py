"""The native artifact: a folder with `model.safetensors`, `quant_config.json` and the model's own `config.json`.

It loads without Hydra and without any Quantizer, and computes the same logits as the model that was trained.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat.atomic import recover
from qat.errors import InputError
from qat.export.architecture import empty_model
from qat.export.model_folder import model_folder
from qat.export.tensor_files import SHARD_BYTES, WEIGHTS, TensorFiles, write_tensors
from qat.nn import PACKED_LAYERS, PackedLayer, PackedTensor, QuantLayer, StoredActivation
from qat.nn.attention import PREFIX
from qat.numerics.metrics import stored_bits
from qat.numerics.qtensor import QuantizedTensor
from qat.quantizers import Quantizer
from qat.transforms.kv import describe_kv, restore_kv
from qat.transforms.layers import conv1d_to_linear, replace
from qat.transforms.slice_bits import slice_bits

FORMAT_VERSION = 3
CONFIG = "quant_config.json"
# By which transformers knows the artifact, once `qat.export.auto` is imported; without it, transformers warns.
METHOD = "lightning-qat"


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a converted `model` to `folder`, completely or not at all; an artifact that stood there is replaced.

    A transformers model brings its `config.json` and generation settings, and the folder is all that `load` needs. For
    another model, `load` takes the unquantized architecture as an argument.

    Args:
        model: a model that `convert` returned.
        folder: where to write.
        tokenizer: saved beside the model, if given.
        shard_bytes: the largest file of tensors.

    Returns:
        The folder.

    Raises:
        InputError: if the model holds no packed layer, the folder holds anything but an artifact, or the weights
            cannot be written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    kv = describe_kv(model)
    if not layers and kv is None:
        raise InputError("Nothing to save: no layer stores codes. Call qat.convert(model) first.")
    tensors, tied = _unique_tensors(model)
    method = {"quant_method": METHOD}
    with model_folder(folder, CONFIG, model, tokenizer, quantization_config=method) as temporary:
        files = write_tensors(temporary, lambda: iter(tensors.items()), shard_bytes)
        config = {
            "format_version": FORMAT_VERSION,
            "bits_per_weight": bits_per_weight(model) if layers else None,
            "density": density(model) if layers else None,
            "sha256": {name: _sha256(temporary / name) for name in files},
            "attention": _attention(getattr(model, "config", None)),
            "experts": getattr(getattr(model, "config", None), "_experts_implementation", None),
            "tied": tied,
            "layers": {name: _describe(layer) for name, layer in layers.items()},
            "kv": kv,
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return Path(folder)


def load(
    folder: str | Path, model: nn.Module | None = None, trust_remote_code: bool = False, bits: int | None = None
) -> nn.Module:
    """Read an artifact back.

    Args:
        folder: what `save` wrote.
        model: the unquantized architecture to fill, its weights being ignored. Default: built from `config.json` by
            transformers.
        trust_remote_code: run model code that `config.json` names.
        bits: of nested codes, only the first so many of each are kept; None: all.

    Returns:
        The model in evaluation mode, its quantized layers being packed.

    Raises:
        InputError: if the folder is not an artifact, is damaged, was written by a newer version, or does not fit the
            architecture, or has no nested codes of `bits` bits.
    """
    folder = Path(folder)
    check_artifact(folder)
    config = read_config(folder / CONFIG)
    _check_sums(folder, config["sha256"])
    files = TensorFiles(folder)
    tensors = {name: files[name] for name in files}
    if model is None:
        model, _ = empty_model(folder, trust_remote_code, config.get("attention"), config.get("experts"))
    pack_layers(model, config)
    restore_kv(model, config.get("kv"))
    _fill(model, tensors, config["tied"])
    if bits is not None:
        slice_bits(model, bits)
    return model.eval()


def pack_layers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Put packed layers, their buffers empty, in the place of the plain ones that `quant_config.json` names."""
    conv1d_to_linear(model)  # as `prepare` did, so that full-precision layers of GPT-2 fit too
    for name, description in config["layers"].items():
        replace(model, name, _allocate(name, description, model))


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits (codes, scales, zero points, codebooks) over the number of quantized weights; shared ones count once.

    The same before `convert` and after it.
    """
    found = [(stored_bits(q), q.shape.numel()) for q in _quantized(model)]
    if not found:
        raise InputError("The model has no quantized weight, so it has no bits per weight.")
    return sum(bits for bits, _ in found) / sum(count for _, count in found)


def density(model: nn.Module) -> float:
    """The share of the quantized weights that are not zero, pruned or rounded to it; shared ones count once.

    The same before `convert` and after it.

    Raises:
        InputError: if no weight is quantized.
    """
    found = [(int(q.dequantize().count_nonzero()), q.shape.numel()) for q in _quantized(model)]
    if not found:
        raise InputError("The model has no quantized weight, so it has no density.")
    return sum(nonzero for nonzero, _ in found) / sum(count for _, count in found)


def quantized_elements(model: nn.Module) -> int:
    """The number of quantized weights; shared ones count once."""
    return sum(q.shape.numel() for q in _quantized(model))


def _quantized(model: nn.Module) -> Iterator[QuantizedTensor]:
    """Every quantized weight, packed or not, one at a time; shared ones once."""
    seen: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            for weight in layer.weights().values():
                if weight.memory not in seen:
                    seen.add(weight.memory)
                    yield weight.quantized()
        elif isinstance(layer, QuantLayer):
            for name, matrix, quantizer in layer.weights():
                key = id(getattr(layer, name))
                if isinstance(quantizer, Quantizer) and key not in seen:
                    seen.add(key)
                    yield quantizer.quantize(matrix)


def _attention(config: Any) -> str | None:
    """The attention implementation of the architecture; that of quantized keys and values is put on top of it."""
    name = getattr(config, "_attn_implementation", None)
    return None if name is None else name.removeprefix(PREFIX)


def _describe(layer: PackedLayer) -> dict[str, Any]:
    weights = {name: weight.description for name, weight in layer.weights().items()}
    description: dict[str, Any] = {"kind": layer.kind, "weights": weights}
    for role in ("input_quantizer", "output_quantizer"):
        stored = getattr(layer, role)
        description[role] = stored.description if isinstance(stored, StoredActivation) else None
    return description


def _allocate(name: str, description: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """The packed layer called `name`, its buffers empty; all but its weights is as in the architecture `model`."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"The artifact does not fit the model, which has no layer {name}.") from error
    try:
        # Version 1 knew linear layers only.
        layer = PACKED_LAYERS[description.get("kind", "linear")]
        weights = description["weights"] if "weights" in description else {"weight": description["weight"]}
        roles = (description["input_quantizer"], description["output_quantizer"])
        packed = {key: PackedTensor(weight) for key, weight in weights.items()}
        stored = [nn.Identity() if role is None else StoredActivation(role) for role in roles]
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{CONFIG} is damaged at layer {name} ({error!r}). Export the run again.") from error
    try:
        return layer(module, packed, *stored)
    except (AttributeError, TypeError) as error:
        raise InputError(f"The artifact does not fit the model, whose {name} is a {type(module).__name__}.") from error


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors, each storage once; and for every other name of a storage, the name it is kept under."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[int, int], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor.detach().contiguous().cpu()
    return kept, tied


def _fill(model: nn.Module, tensors: dict[str, Tensor], tied: Mapping[str, str]) -> None:
    owners = dict(model.named_modules(remove_duplicate=False))
    expected = set(model.state_dict())
    missing = expected - set(tensors) - set(tied)
    unexpected = (set(tensors) | set(tied)) - expected
    if missing or unexpected:
        raise InputError(
            f"The artifact does not fit the model: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}."
        )
    parameters: dict[str, nn.Parameter] = {}
    for name in expected:
        source = tied.get(name, name)
        path, _, leaf = name.rpartition(".")
        owner = owners[path]
        if leaf in owner._parameters:
            parameters.setdefault(source, nn.Parameter(tensors[source], tensors[source].is_floating_point()))
            setattr(owner, leaf, parameters[source])
        else:
            setattr(owner, leaf, tensors[source])


def check_artifact(folder: str | Path) -> None:
    """Refuse a folder that `save` did not write, without reading it.

    Raises:
        InputError: if so.
    """
    recover(Path(folder))
    if not (Path(folder) / CONFIG).is_file():
        raise InputError(f"{folder} is not an artifact of this project: it has no {CONFIG}.")


def read_config(path: str | Path) -> dict[str, Any]:
    """What `quant_config.json` says.

    Raises:
        InputError: if it is damaged, or was written by a newer version.
    """
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text())
        version = config["format_version"]
        absent = {"sha256", "tied", "layers"} - set(config)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}). Export the run again.") from error
    if version > FORMAT_VERSION:
        raise InputError(f"{path} has format_version {version}, this version reads up to {FORMAT_VERSION}: upgrade.")
    if absent:
        raise InputError(f"{path} is damaged (no {', '.join(sorted(absent))}). Export the run again.")
    return config


def _check_sums(folder: Path, sums: str | Mapping[str, str]) -> None:
    """Refuse files that are not those that were written."""
    for name, expected in ({WEIGHTS: sums} if isinstance(sums, str) else sums).items():  # one file until version 2
        if Path(name).name != name:
            raise InputError(f"{folder / CONFIG} names {name!r}, which is no file of its folder: refused.")
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}. Export the run again.")
        if _sha256(folder / name) != expected:
            raise InputError(f"{folder / name} is damaged: its checksum differs from {CONFIG}. Export the run again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
