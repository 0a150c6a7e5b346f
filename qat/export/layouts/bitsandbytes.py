"""The layout of bitsandbytes checkpoints in NF4, which transformers and vLLM read without quantizing anything.

For a layer `[out, in]` of n weights in blocks of g, row by row:

    weight                                uint8 [n / 2, 1]     two codes a byte, the first in the upper half
    weight.absmax                         float32 [n / g]      the scales
    weight.quant_map                      float32 [16]         the table
    weight.quant_state.bitsandbytes__nf4  uint8                JSON: block size, shape, dtype

With double quantization the scales are codes too, and their mean is in the JSON:

    weight.absmax            uint8 [n / g]
    weight.nested_absmax     float32 [n / g / 256]
    weight.nested_quant_map  float32 [256]

QLoRA (arXiv 2305.14314); the format is that of `QuantState.as_dict(packed=True)`. The library's kernels have the table
compiled in, so no other can go. Its FP4 is not fp4_e2m1: the least number is 1/192 of the largest there, not 1/12.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.errors import InputError
from qat.export.grids import LayerGrid, WeightGrid
from qat.export.layouts.base import Config, Layout, Misfit, StoredLinear, boundary_misfits, weight_only_misfits
from qat.export.layouts.checks import option, taken
from qat.nn import PackedLinear
from qat.nn.packed import dtype_name
from qat.numerics.codebooks import dynamic_map, fixed_codebook, table
from qat.numerics.formats import CodebookFormat
from qat.numerics.granularity import PerFlatGroup, PerGroup
from qat.numerics.qtensor import QParams, QuantizedTensor

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256
_STATE = "weight.quant_state.bitsandbytes__nf4"
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
_ZERO = 7  # the code of zero, which fills the last byte


class BitsAndBytesLayout(Layout):
    """What checkpoints of bitsandbytes have in common: names."""

    method = "bitsandbytes"
    package = "bitsandbytes"
    exact_engine = False  # for CPUs with bfloat16 products it rounds scales to them, and inputs of 8 bits by float16

    def joint_misfits(self, grids: Mapping[str, LayerGrid], others: Sequence[str]) -> Iterator[Misfit]:
        return boundary_misfits(grids, others)

    def split(self, name: str) -> tuple[str, str]:
        layer, _, leaf = name.partition(".weight.")
        return (layer, f"weight.{leaf}") if leaf else super().split(name)

    def is_quantized(self, names: set[str]) -> bool:
        return "SCB" in names or any(name.startswith("weight.") for name in names)


class BitsAndBytes(BitsAndBytesLayout):
    """NF4 in blocks, its scales in float32 or quantized in turn, layer by layer."""

    title = "bitsandbytes"

    @classmethod
    def wrote(cls, config: Config) -> bool:
        return super().wrote(config) and not config.get("load_in_8bit")

    def misfits(self, grid: LayerGrid) -> Iterator[Misfit]:
        yield from weight_only_misfits(grid)
        weight = grid.weights["weight"]
        if weight.format != CodebookFormat(16):
            yield Misfit(f"{weight.format.name} codes", "quantizer@scheme.weight=nf4")
        elif not _is_table(weight.codebook, _nf4()) or weight.offset:
            yield Misfit("a table that is not NF4", "quantizer@scheme.weight=nf4")
        if _block(weight) not in _BLOCKS:
            yield Misfit(f"scales {weight.granularity} on rows of {weight.shape[-1]}", _nearest_blocks(weight))
        if isinstance(weight.scale, WeightGrid) and not _is_nested(weight.scale):
            yield Misfit("scales that are quantized in another way", "quantizer@scheme.weight=nf4_double")
        elif isinstance(weight.scale, torch.dtype) and weight.scale != torch.float32:
            yield Misfit("scales that are not float32", "scheme.weight.scale_dtype=float32")

    def config(self, layers: Mapping[str, PackedLinear], others: Sequence[str]) -> Config:
        weights = [layer.weight.without_codes() for layer in layers.values()]
        return {
            "quant_method": self.method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(isinstance(q.qparams.scale, QuantizedTensor) for q in weights),
            "bnb_4bit_compute_dtype": dtype_name(weights[0].dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(others),
        }

    def tensors(self, layer: PackedLinear, config: Config) -> Iterator[tuple[str, Tensor]]:
        q = layer.weight.quantized()
        scale, codebook = q.qparams.scale, q.qparams.codebook
        assert codebook is not None
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": _block(WeightGrid.of(q)),
            "dtype": dtype_name(q.dtype),
            "shape": list(q.shape),
        }
        yield "weight", _to_bytes(q.codes)
        yield "weight.quant_map", codebook.flatten()
        if isinstance(scale, QuantizedTensor):
            absmax, _, nested_map, offset = scale.qparams
            assert isinstance(absmax, Tensor)
            assert nested_map is not None
            assert offset is not None
            state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
            yield "weight.absmax", scale.codes.flatten()
            yield "weight.nested_absmax", absmax.flatten()
            yield "weight.nested_quant_map", nested_map.flatten()
        else:
            yield "weight.absmax", scale.flatten()
        yield _STATE, torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def restore(self, tensors: Mapping[str, Tensor], config: Config, name: str, dtype: torch.dtype) -> StoredLinear:
        option(config, "load_in_4bit", [True])
        option(config, "bnb_4bit_quant_type", ["nf4"])
        state = _state(taken(tensors, _STATE, name, [torch.uint8], (None,)), name)
        shape, block = torch.Size(state["shape"]), state["blocksize"]
        stored = taken(tensors, "weight", name, _STORAGE, (None, 1)).contiguous().view(torch.uint8)
        if stored.numel() != math.ceil(shape.numel() / 2):
            raise InputError(f"{name}.weight has {stored.numel()} bytes, which are not those of {list(shape)} codes.")
        granularity = PerGroup(block) if shape[-1] % block == 0 else PerFlatGroup(block)
        scale = _scale(tensors, state, name, granularity.param_shape(shape))
        codebook = _known_table(tensors, "weight.quant_map", name, _nf4()).view(*(1,) * len(scale.shape), -1)
        qparams = QParams(scale, codebook=codebook)
        return StoredLinear(
            QuantizedTensor(_from_bytes(stored, shape), qparams, CodebookFormat(16), granularity, dtype)
        )


def _nf4() -> Tensor:
    """The table of bitsandbytes, float32 `[16]`."""
    return fixed_codebook("nf", 4)


def _is_table(codebook: Tensor | None, expected: Tensor) -> bool:
    """Whether a codebook is `expected`, or may be where its values are not known."""
    if codebook is None or codebook.numel() != expected.numel() or codebook.dtype != expected.dtype:
        return False
    return codebook.is_meta or torch.equal(codebook.flatten().cpu(), expected)


def _is_nested(scale: WeightGrid) -> bool:
    """Whether quantized scales are those of QLoRA."""
    same_grid = (scale.format, scale.granularity) == (CodebookFormat(256), PerFlatGroup(_NESTED_BLOCK))
    return same_grid and scale.scale == torch.float32 and _is_table(scale.codebook, table(dynamic_map()))


def _block(weight: WeightGrid) -> int | None:
    """Consecutive elements that share a scale; None where they do not stay within rows.

    The format lets blocks cross rows, but kernels of bitsandbytes 0.50 for CPUs take the scales of others then.
    """
    return weight.shape[-1] if weight.group_size == -1 else weight.group_size


def _nearest_blocks(weight: WeightGrid) -> str:
    """The option for blocks that divide rows."""
    wanted, fitting = _block(weight) or 64, [size for size in _BLOCKS if weight.shape[-1] % size == 0]
    if not fitting:
        return 'scheme.exclude=["THE LAYER"]'
    return f"scheme.weight.granularity=per_group_{min(fitting, key=lambda size: abs(size - wanted))}"


def _to_bytes(codes: Tensor) -> Tensor:
    """Codes of any shape, two a byte, `[bytes, 1]`."""
    pairs = F.pad(codes.flatten(), (0, codes.numel() % 2), value=_ZERO).view(-1, 2)
    return pairs[:, :1] << 4 | pairs[:, 1:]


def _from_bytes(stored: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_to_bytes`."""
    codes = torch.stack([stored.flatten() >> 4, stored.flatten() & 15], dim=1)
    return codes.flatten()[: shape.numel()].view(shape)


def _state(packed: Tensor, name: str) -> dict[str, Any]:
    """The JSON of a layer, with what is read of it checked."""
    try:
        state: dict[str, Any] = json.loads(bytes(packed.tolist()))
        shape = [int(size) for size in state["shape"]]
        fits = state["quant_type"] == "nf4" and state["blocksize"] in _BLOCKS and len(shape) == 2 and min(shape) > 0
        nested = "nested_blocksize" in state
        fits = fits and (not nested or state["nested_blocksize"] == _NESTED_BLOCK)
        offset = torch.tensor(float(state["nested_offset"])) if nested else None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{name}.{_STATE} is damaged ({error!r}): fetch or export the checkpoint again.") from error
    if not fits:
        raise InputError(f"{name}.{_STATE} is not that of a matrix in NF4: {state}.")
    return {"shape": shape, "blocksize": state["blocksize"], "offset": offset}


def _scale(
    tensors: Mapping[str, Tensor], state: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Tensor | QuantizedTensor:
    """The scales of a layer, of `shape`."""
    count, offset = math.prod(shape), state["offset"]
    if offset is None:
        return taken(tensors, "weight.absmax", name, [torch.float32], (count,)).view(shape)
    codes = taken(tensors, "weight.absmax", name, [torch.uint8], (count,)).view(shape)
    blocks = math.ceil(count / _NESTED_BLOCK)
    absmax = taken(tensors, "weight.nested_absmax", name, [torch.float32], (blocks,))
    codebook = _known_table(tensors, "weight.nested_quant_map", name, table(dynamic_map()))
    qparams = QParams(absmax, codebook=codebook[None], offset=offset[None])
    return QuantizedTensor(codes, qparams, CodebookFormat(256), PerFlatGroup(_NESTED_BLOCK), torch.float32)


def _known_table(tensors: Mapping[str, Tensor], leaf: str, name: str, expected: Tensor) -> Tensor:
    found = taken(tensors, leaf, name, [torch.float32], expected.shape)
    if not torch.equal(found, expected):
        raise InputError(f"{name}.{leaf} is not the table that bitsandbytes computes with.")
    return found
