"""GGUF as one of the targets: `model.gguf`, and beside it what transformers and this project read it back with.

The file alone is all that llama.cpp, Ollama and the like need. The folder holds `config.json` too, because metadata of
GGUF leave out what a few architectures need (the scaling of Llama 3's rotary positions, the dtype of the values), and
the tokenizer's own files, because not every tokenizer has a place in GGUF.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType
from torch import Tensor, nn

from qat.atomic import recover
from qat.errors import InputError
from qat.export.consumers import Consumer, NotInstalled, transformers_consumer
from qat.export.gguf import FILE as FILE
from qat.export.gguf.architectures import Names, architecture_of
from qat.export.gguf.blocks import TERNARY_TYPES, BlockType, holder, misfits
from qat.export.gguf.reading import read_model
from qat.export.gguf.rope import FACTORS, rope_factors
from qat.export.gguf.tokenizer import tokenizer_metadata
from qat.export.gguf.writing import FLOAT_TYPES, Planned, write_file
from qat.export.grids import LayerGrid, WeightGrid
from qat.export.layouts.base import Misfit
from qat.export.model_folder import computing_dtype, model_folder
from qat.export.targets import Target, refuse, refuse_cache, stored_grids
from qat.nn import PackedLayer, PackedTensor

_KINDS = ("linear", "embedding")
_FILE_TYPES = {"MXFP4": "MOSTLY_MXFP4_MOE"}
# As llama.cpp's own converter keeps them, beside everything of one dimension.
_ALWAYS_FLOAT32 = ("position_embd.weight",)


class Gguf(Target):
    """Files of llama.cpp.

    Args:
        ternary: how -1, 0 and 1 are stored: TQ2_0 in 2.06 bits, which is faster, or TQ1_0 in 1.69.
        name: what `general.name` says; None leaves it out.
    """

    title = "GGUF"

    def __init__(self, ternary: str = "TQ2_0", name: str | None = None) -> None:
        if ternary not in TERNARY_TYPES:
            raise InputError(f"export.gguf.ternary is {ternary}: choose {' or '.join(TERNARY_TYPES)}.")
        self.ternary = ternary
        self.name = name

    def check(self, model: nn.Module) -> None:
        refuse_cache(self.title, model)
        grids = stored_grids(self.title, model)
        config = getattr(model, "config", None)
        architecture_of(config).check(config)
        for name, grid in grids.items():
            refuse(self.title, name, _misfits(grid))

    def write(self, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
        self.check(model)
        config: Any = model.config
        tensors = list(self._tensors(model, config))
        metadata = self._metadata(config, tensors) | tokenizer_metadata(tokenizer, config.vocab_size)
        with model_folder(folder, FILE, model, tokenizer, dtype=computing_dtype(model)) as temporary:
            write_file(temporary / FILE, architecture_of(config).name, metadata, tensors)
        return Path(folder)

    def read(self, folder: str | Path, trust_remote_code: bool = False) -> nn.Module:
        """What `write` wrote, or a file of others: a folder with one `.gguf` file, or that file."""
        return read_model(_file_in(Path(folder)), trust_remote_code)

    def consumer(self, folder: Path) -> Consumer:
        from transformers import AutoConfig, GgufConfig

        # The configuration beside the file: of the metadata transformers knows too few keys.
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != architecture_of(config).name:
            raise NotInstalled(
                f"transformers opens no GGUF file of {config.model_type}, llama.cpp does: make test-engines"
            )
        quantization = GgufConfig(dequantize=True)
        options = {"gguf_file": FILE, "config": config, "dtype": config.dtype, "quantization_config": quantization}
        return transformers_consumer(folder, "gguf", **options)

    def _metadata(self, config: Any, tensors: list[Planned]) -> dict[str, Any]:
        architecture = architecture_of(config)
        common = Counter(tensor.type for tensor in tensors if tensor.type not in FLOAT_TYPES.values()).most_common(1)
        kind = _FILE_TYPES.get(common[0][0], f"MOSTLY_{common[0][0]}")
        general = {
            "general.type": "model",
            "general.quantization_version": GGML_QUANT_VERSION,
            "general.file_type": int(LlamaFileType[kind]),
        }
        if self.name:
            general["general.name"] = self.name
        return general | {f"{architecture.name}.{key}": value for key, value in architecture.metadata(config).items()}

    def _tensors(self, model: nn.Module, config: Any) -> Iterator[Planned]:
        """All tensors; one that several modules share, once, and that which comes first is the embedding."""
        names = Names(architecture_of(config), config)
        seen: set[int] = set()
        for module, leaf, tensor in _stored(model):
            address = tensor.memory if isinstance(tensor, PackedTensor) else tensor.data_ptr()
            if address in seen:
                continue
            seen.add(address)
            name, order = names.of(module, leaf), names.order(module, tensor.shape[0])
            if isinstance(tensor, PackedTensor):
                block = holder(WeightGrid.of(tensor.without_codes()), self.ternary)
                assert block is not None
                yield Planned(name, block.name, tuple(tensor.shape), _Blocks(tensor, block, order))
            else:
                kept = tensor.dtype if tensor.ndim > 1 and name not in _ALWAYS_FLOAT32 else torch.float32
                yield Planned(name, FLOAT_TYPES[kept], tuple(tensor.shape), _Numbers(tensor, kept, order))
        factors = rope_factors(config)
        if factors is not None:
            yield Planned(FACTORS, "F32", tuple(factors.shape), lambda: factors)


class _Blocks:
    """Makes the bytes of a packed tensor."""

    def __init__(self, tensor: PackedTensor, block: BlockType, order: Tensor | None) -> None:
        self.tensor, self.block, self.order = tensor, block, order

    def __call__(self) -> Tensor:
        rows = self.block.to_bytes(self.tensor.quantized()).cpu()
        return rows if self.order is None else rows[self.order]


class _Numbers:
    """Makes the bytes of a tensor in full precision."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype, order: Tensor | None) -> None:
        self.tensor, self.dtype, self.order = tensor, dtype, order

    def __call__(self) -> Tensor:
        rows = self.tensor.detach().cpu().to(self.dtype)
        return rows if self.order is None else rows[self.order]


def _misfits(grid: LayerGrid) -> Iterator[Misfit]:
    if grid.kind not in _KINDS:
        yield Misfit(f"a quantized {grid.kind} layer", "export=native")
        return
    if grid.input is not None:
        yield Misfit("a quantized input", "quantizer@scheme.input=none")
    if grid.output is not None:
        yield Misfit("a quantized output", "quantizer@scheme.output=none")
    yield from misfits(grid.weights["weight"])


def _stored(model: nn.Module) -> Iterator[tuple[str, str, Tensor | PackedTensor]]:
    """Every tensor that is stored: the name of its module, its own, and itself."""
    for name, module in model.named_modules():
        if isinstance(module, PackedTensor):
            continue
        if isinstance(module, PackedLayer):
            yield from ((name, leaf, weight) for leaf, weight in module.weights().items())
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield name, leaf, tensor


def _file_in(path: Path) -> Path:
    """The GGUF file that `path` is or holds."""
    recover(path)
    if path.suffix == ".gguf" or (path / FILE).is_file():
        return path if path.suffix == ".gguf" else path / FILE
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(f"{path} holds {len(found)} GGUF files: name one of them.")
    return found[0]
