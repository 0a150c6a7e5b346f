"""Random quantized weights of every kind that kernels take."""

import torch

from qat.kernels.quantized_linear.weight import TiledWeight
from qat.numerics.formats import parse_format
from qat.numerics.granularity import parse_granularity
from qat.numerics.qtensor import QParams, QuantizedTensor

# Format, granularity, what else: a zero point for each group, one codebook, one for each row, one on the 7-bit grid.
KINDS = [
    ("int4", "per_group_64", ""),
    ("int4", "per_group_32", ""),
    ("int4", "per_group_128", ""),
    ("int4", "per_channel", ""),
    ("int2", "per_group_64", ""),
    ("int3", "per_group_64", ""),
    ("int8", "per_channel", ""),
    ("int8", "per_group_64", ""),
    ("levels3", "per_group_64", ""),
    ("uint4", "per_group_64", "zero"),
    ("uint4", "per_channel", "zero"),
    ("uint3", "per_group_32", "zero"),
    ("uint2", "per_group_128", "zero"),
    ("uint8", "per_group_64", "zero"),
    ("codebook16", "per_group_64", "one"),
    ("codebook16", "per_group_64", "rows"),
    ("codebook16", "per_channel", "rows"),
    ("codebook16", "per_group_64", "grid"),
    ("codebook8", "per_group_64", "one"),
    ("codebook8", "per_channel", "rows"),
    ("codebook8", "per_group_64", "grid"),
    ("codebook4", "per_group_64", "one"),
    ("codebook4", "per_channel", "rows"),
    ("codebook4", "per_group_64", "grid"),
    ("levels4", "per_group_64", ""),
    ("fp4_e2m1", "per_group_32", ""),
]


def ids(kind):
    return " ".join(filter(None, kind))


def quantized(kind, shape, dtype=torch.float32, scale_dtype=torch.bfloat16, device="cpu"):
    name, spelling, extra = kind
    format, granularity = parse_format(name), parse_granularity(spelling)
    low, high = format.code_range
    params = granularity.param_shape(shape)
    codes = torch.randint(low, high + 1, shape, device=device).to(format.code_dtype)
    scale = (torch.rand(params, device=device) * 0.02 + 0.01).to(scale_dtype)
    zero = torch.randint(low, high + 1, params, device=device).float() if extra == "zero" else None
    return QuantizedTensor(
        codes, QParams(scale, zero, codebook(format, shape[0], extra, device)), format, granularity, dtype
    )


def codebook(format, rows, extra, device):
    if extra == "grid":
        return ((torch.randperm(128, device=device)[: format.entries] - 64) / 64).sort().values.view(1, 1, -1)
    if extra not in ("one", "rows"):
        return None
    table = torch.randn(rows if extra == "rows" else 1, 1, format.entries, device=device)
    return table.sort().values.bfloat16()


def weight_like(layout):
    """A TiledWeight of `layout` without its codes, to ask what multiplies it; scales of 16 bits, one table."""
    scale = torch.empty(0, 256 // layout.group if layout.group else 1)
    table = torch.empty(1, 2**layout.bits) if layout.tables else None
    return TiledWeight(torch.empty(0), scale, None, table, layout)
