"""Trying launches on the GPU at hand: how fast a packed weight is multiplied by each that makes sense."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError
from qat.kernels.quantized_linear import ops, reference
from qat.kernels.quantized_linear.choice import SHAPES, SHARED_BYTES, shared_bytes
from qat.kernels.quantized_linear.launches import Choice, Dequantize, Ring, Skinny, Wide
from qat.kernels.quantized_linear.weight import TiledWeight
from qat.kernels.timing import microseconds, ring

# Relative error, in the Frobenius norm, that a product of bfloat16 has at most.
_GATE = 1e-2


def fastest_first(
    weight: TiledWeight, tokens: int, dtype: torch.dtype = torch.bfloat16, tried: Callable[[], None] = lambda: None
) -> list[tuple[Choice, float]]:
    """Launches for `tokens` and `weight`, and their microseconds; a second or so for each, mostly to compile it.

    Launches that do not fit the GPU, and products that are wrong, are left out. `tried` is called after each.

    Raises:
        InputError: if none is left.
    """
    from triton import TritonError  # at its first use, as everywhere

    x = torch.randn(tokens, weight.layout.columns, device=weight.tiles.device).to(dtype)
    exact = reference.quantized_linear(x.float(), weight, None)
    sets, times = copies(weight, dtype), {}
    for how in candidates(weight, tokens):
        try:
            y = ops.product_by(how, x, weight, weight.words_for(dtype))
            if relative_error(y, exact) < _GATE:
                times[how] = microseconds(lambda w, how=how: ops.product_by(how, x, w, w.words_for(dtype)), sets)
        except (InputError, RuntimeError, TritonError):  # it needs more registers or memory than there is
            pass
        tried()
    if not times:
        raise InputError(f"No kernel multiplies {tokens} tokens by a weight like {weight.layout} on this GPU.")
    return sorted(times.items(), key=lambda found: found[1])


def relative_error(y: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm."""
    return float((y.float() - exact).norm() / exact.norm())


def copies(weight: TiledWeight, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """As many copies of the weight in other places as no cache holds."""

    def another() -> tuple[TiledWeight]:
        words, zero = weight.words_for(dtype), weight.zero
        own = replace(weight, tiles=weight.tiles.clone(), scale=weight.scale.clone(), words={})
        if words is not None:
            own.words[dtype] = words.clone()
        return (own if zero is None else replace(own, zero=zero.clone()),)

    return ring(another, sum(tensor.nbytes for tensor in weight.tensors()))


def candidates(weight: TiledWeight, tokens: int) -> Iterator[Choice]:
    """Launches worth trying, that fit a multiprocessor."""
    for how in dict.fromkeys(_sensible(tokens)):
        if not isinstance(how, Wide) or shared_bytes(weight.layout, how) <= SHARED_BYTES:
            yield how


def _sensible(tokens: int) -> Iterator[Choice]:
    if tokens <= 32:
        for warps, warps_k in ((1, 1), (2, 2), (4, 4), (4, 2), (8, 8), (8, 4), (4, 1), (8, 2)):
            for registers in (96, 128, 168, 255):
                yield from (Skinny(warps, warps_k, registers, ahead) for ahead in (False, True))
                yield from (Ring(warps, warps_k, registers, stages) for stages in (2, 3, 4))
    if tokens > 8:
        yield from _wide(tokens)
    if tokens >= 64:
        yield Dequantize()


def _wide(tokens: int) -> Iterator[Wide]:
    """Tiles no broader than the tokens fill; columns are split only where few programs would run."""
    for how in SHAPES:
        if how.tokens >= 128 if tokens > 128 else tokens / 2 <= how.tokens < 2 * tokens:
            for splits in (1, 2, 4) if tokens <= 256 else (1,):
                yield how._replace(splits=splits)
                if how.tokens <= 64:
                    yield how._replace(splits=splits, stages=6)
                    yield how._replace(splits=splits, stages=3, depth=4)
