"""Launches of the kernels of `kernel.py`."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional

from qat.kernels.attention_decode import kernel
from qat.kernels.attention_decode.cached import EVERY_TOKEN, CachedTokens, shared_by
from qat.kernels.launch import KEPT, Launch
from qat.kernels.quantized_linear.decode import REALS, fixed_offsets, integers
from qat.numerics.formats import parse_format
from qat.numerics.packing import packed_bytes

# Triton's interpreter knows no assembly.
_COMPILED = isinstance(kernel.attend, triton.runtime.JITFunction)
# Tokens in full precision that a program takes.
RECENT = 16
# Stretches that are read at a time where they are added.
_PARTS = 32
# Columns of the tensor core's instruction; words of a token, so that pairs fill its sum of 16; tokens, likewise.
_HEADS, _LEAST_WORDS, _LEAST_TOKENS = 8, 8, 16
_LOG2_E = math.log2(math.e)


class Choice(NamedTuple):
    """How attention is launched; every program is one warp.

    tokens: of a block, at most.
    programs: how many to aim at for each multiprocessor.
    least: blocks of a stretch, at least: what a program begins and ends with takes as long as some blocks.
    registers: of a thread, at most; fewer let more programs run beside each other.
    stages: blocks that are on their way or in use.
    """

    tokens: int = 64
    programs: int = 16
    least: int = 4
    registers: int = 168
    stages: int = 3


# By the bits of keys. From counts of instructions and registers, not yet from measurements.
CHOICES = {2: Choice(registers=128), 4: Choice(), 8: Choice(tokens=32)}


class Grid(NamedTuple):
    """The tuples KEYS and VALUES of the kernels, in the order that `codes.py` names."""

    bits: int
    center: int
    words: int
    wide: int
    rows: int
    columns: int
    across: int
    has_zero: bool
    text: str
    constraints: str


class _Mask(NamedTuple):
    """kind: none, causal, bool or add. strides: of batch, query and token."""

    kind: str
    tensor: Tensor
    strides: tuple[int, int, int]
    lowest: float


class _Stored(NamedTuple):
    """What a kernel takes of keys or values; capacity and scales are the rows that a head has of codes and scales."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    quantized: int
    capacity: int
    scales: int
    recent: int


def attention_decode(
    q: Tensor, mask: Tensor | None, scaling: float, keys: CachedTokens, values: CachedTokens
) -> Tensor:
    """See `ops.attention_decode`. Nothing waits for the GPU, and a token more compiles nothing."""
    batch, heads, queries, dim = q.shape
    kv_heads, length = keys.tail.shape[1], keys.length
    grids = _grid(keys, dim, q.dtype), _grid(values, dim, q.dtype)
    q = q if q.stride(-1) == 1 else q.contiguous()
    masked, choice = _mask(mask, q), CHOICES[grids[0].bits]
    tokens = tokens_of_block(*grids, choice.tokens)
    # A query sees everything before the queries.
    blocks = max(0, min(keys.quantized, values.quantized, length - queries + 1)) // tokens
    each = blocks_of_stretch(blocks, batch * kv_heads, choice, _multiprocessors(q.device))
    splits = -(-blocks // each)
    stretches = splits + -(-(length - blocks * tokens) // RECENT)
    sizes = batch, kv_heads, heads // kv_heads, queries, dim, tokens, stretches
    attend, add = _ready(*grids, *sizes, masked.kind, choice)
    rows = batch * heads * queries * stretches
    sums = torch.empty((rows, dim), dtype=torch.float32, device=q.device)
    highest, mass = (torch.empty(rows, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    key, value = (_stored(own, grid) for own, grid in zip((keys, values), grids, strict=True))
    counts = splits, stretches, length, key.quantized, value.quantized, blocks, each
    room = key.capacity, value.capacity, key.scales, value.scales, key.recent, value.recent
    changing = (*counts, *room, *q.stride()[:3], *masked.strides, scaling * _LOG2_E, masked.lowest)
    attend(q, *key.tensors, *value.tensors, masked.tensor, sums, highest, mass, changing=changing)
    add(sums, highest, mass, out, changing=(stretches,))
    return out


def tokens_of_block(keys: Grid, values: Grid, most: int) -> int:
    """Tokens of a block: keys of one share their scales, where these are not shared by whole tokens."""
    if values.across > 1:
        most = min(most, 32)  # scales for values take registers
    if keys.across == 1 or keys.rows == 1:
        return most
    shared = keys.rows & -keys.rows  # the largest power of two that divides it
    return min(most, shared) if shared >= _LEAST_TOKENS else most


def blocks_of_stretch(blocks: int, heads: int, choice: Choice, multiprocessors: int) -> int:
    """Blocks that a program takes, so that there are about as many programs as `choice` says."""
    wanted = max(1, choice.programs * multiprocessors // heads)
    return max(-(-blocks // wanted), min(blocks, choice.least), 1)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _grid(stored: CachedTokens, dim: int, dtype: torch.dtype) -> Grid:
    return grid_of(stored.format, stored.granularity, stored.zero_point is not None, dim, dtype)


@lru_cache
def grid_of(spelling: str, granularity: str, has_zero: bool, dim: int, dtype: torch.dtype) -> Grid:
    """How the kernels decode codes of a format for q of `dtype`."""
    format = parse_format(spelling)
    rows, columns = shared_by(granularity, dim)
    words, center = packed_bytes(dim, format.bits) // 4, -format.code_range[0]
    text, constraints = assembly(format.bits, center, dtype) if _COMPILED else ("", "")
    wide = max(_LEAST_WORDS, 1 << (words - 1).bit_length())
    return Grid(format.bits, center, words, wide, rows, columns, dim // columns, has_zero, text, constraints)


def assembly(bits: int, center: int, dtype: torch.dtype) -> tuple[str, str]:
    """Inline assembly that makes the pairs of a word, code - center, and its constraints."""
    real = REALS[dtype]
    outs = [f"${i}" for i in range(16 // bits)]
    setting, offsets = fixed_offsets(center, bits, real, "offset")
    lines = ["{", *setting, *integers([f"${len(outs)}"], 0, bits, real, offsets, outs), "}"]
    return "\n".join(lines), ",".join(["=&r"] * len(outs) + ["r"])


@lru_cache(KEPT)
def _ready(
    keys: Grid,
    values: Grid,
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    dim: int,
    tokens: int,
    stretches: int,
    mask: str,
    choice: Choice,
) -> tuple[Launch, Launch]:
    rows, width = group * queries, max(16, 1 << (dim - 1).bit_length())
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "QUERIES": queries,
        "HEADS": max(_HEADS, 1 << (rows - 1).bit_length()),
        "DIM": dim,
        "WIDTH": width,
        "T": tokens,
        "RECENT": RECENT,
        "MASK": mask,
        "KEYS": tuple(keys),
        "VALUES": tuple(values),
    }
    options = {"num_stages": choice.stages, "maxnreg": choice.registers}
    attend = Launch(kernel.attend, batch * kv_heads * stretches, (), constants, num_warps=1, **options)
    sizes = {"EACH": rows, "DIM": dim, "WIDTH": width, "PARTS": _PARTS}
    return attend, Launch(kernel.add_parts, batch * kv_heads * rows, (), sizes, num_warps=8)


def _mask(mask: Tensor | None, q: Tensor) -> _Mask:
    if mask is None:
        return _Mask("none" if q.shape[2] == 1 else "causal", q, (0, 0, 0), 0.0)
    batch, _, query, token = mask.stride()
    strides = batch if len(mask) > 1 else 0, query, token
    if mask.dtype == torch.bool:
        return _Mask("bool", mask.view(torch.uint8), strides, 0.0)
    return _Mask("add", mask, strides, torch.finfo(mask.dtype).min)


def _stored(tokens: CachedTokens, grid: Grid) -> _Stored:
    codes, capacity = _with_room(tokens.codes)
    scale, scales = _scales(tokens.scale, grid)
    zero = scale if tokens.zero_point is None else _scales(tokens.zero_point, grid, scales)[0]
    tail = tokens.tail.contiguous()
    return _Stored((codes.view(torch.int32), scale, zero, tail), tokens.quantized, capacity, scales, tail.shape[-2])


def _with_room(x: Tensor) -> tuple[Tensor, int]:
    """`x` `[batch, heads, rows, width]` and how many rows a head has in memory, of which the first are there."""
    _, heads, rows, width = x.shape
    outer = x.stride(0) if heads == 1 else x.stride(1)
    regular = heads == 1 or len(x) == 1 or x.stride(0) == heads * outer
    if regular and x.stride(-1) == 1 and x.stride(-2) == width and outer % width == 0:
        return x, outer // width
    return x.contiguous(), rows


def _scales(params: Tensor, grid: Grid, room: int | None = None) -> tuple[Tensor, int]:
    """Scales or zero points, and how many rows a head has; `room` is what it has to be."""
    if grid.rows == EVERY_TOKEN:
        return params.contiguous(), 0
    own, rows = _with_room(params)
    by_words = grid.rows == 1 and grid.across == 1
    if rows != (room or rows) or (by_words and (rows % 4 or own.data_ptr() % 4)):
        own = functional.pad(params, (0, 0, 0, (room or rows + -rows % 4) - params.shape[-2]))
        rows = own.shape[-2]
    return own, rows
