"""Other libraries' kernels for packed weights, as functions of x; those that are not installed are left out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.numerics.qtensor import QuantizedTensor

Layer = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """A library: what it is called, which kinds of weights it multiplies, and a layer with about the given weight.

    A layer quantizes the values anew, by its library's own rule: its numbers are not compared, its time is.
    """

    name: str
    kinds: tuple[str, ...]
    layer: Callable[[QuantizedTensor], Layer]


def gemlite(q: QuantizedTensor) -> Layer:
    """Groups of 64 with a scale and a zero point each; its autotuning has run before it is timed."""
    from gemlite.helper import A16Wn

    rows, columns = q.shape
    codes = torch.randint(0, 16, (rows, columns), device="cuda", dtype=torch.uint8)
    scales = torch.rand(rows * columns // 64, 1, device="cuda", dtype=torch.bfloat16)
    zeros = torch.full_like(scales, 8.0)
    layer: Any = A16Wn(device="cuda:0", dtype=torch.bfloat16).from_weights(
        codes, scales, zeros, W_nbits=4, group_size=64, bias=None
    )
    return lambda x: layer(x)


def bitsandbytes(q: QuantizedTensor) -> Layer:
    """NF4, blocks of 64."""
    import bitsandbytes.functional as functional
    from bitsandbytes import matmul_4bit

    packed, state = functional.quantize_4bit(q.dequantize(), blocksize=64, quant_type="nf4")
    return lambda x: matmul_4bit(x, packed.t(), quant_state=state)


def torchao(q: QuantizedTensor) -> Layer:
    """Groups of 64, the layout of tinygemm."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = nn.Linear(q.shape[1], q.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)
    linear.weight.data = q.dequantize()
    quantize_(linear, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    return linear


PEERS = [
    Peer("gemlite", ("int4",), gemlite),
    Peer("bitsandbytes", ("nf4",), bitsandbytes),
    Peer("torchao", ("int4",), torchao),
]
