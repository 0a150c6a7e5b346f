"""Scales in the dtype in which the library multiplies.

It dequantizes in the dtype of the scale, after it cast scales to the dtype of the model. So scales are stored in the
dtype of the weight: then codes * scale is rounded once, to the weight's dtype, as here. A code without its
zero point has at most 8 bits and a 16-bit scale at most 11, so that their product is exact in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat.errors import InputError
from qat.export.grids import WeightGrid
from qat.export.layouts.base import Misfit
from qat.nn.packed import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_misfits(dtype: object, weight: torch.dtype, role: str = "weight") -> Iterator[Misfit]:
    """Misfits of scales of `dtype` for a model whose weights have the dtype `weight`."""
    if weight not in DTYPES:
        yield Misfit(f"values in {dtype_name(weight)}", "model.dtype=bfloat16")
    elif dtype not in DTYPES:
        yield Misfit("scales that are quantized themselves", f"quantizer@scheme.{role}=lsq")
    elif weight not in (dtype, torch.float32):
        name = dtype_name(weight)
        yield Misfit(f"scales that a {name} model rounds", f"scheme.{role}.scale_dtype={name}")


def scale_misfits(weight: WeightGrid) -> Iterator[Misfit]:
    """Misfits of the scales of a weight."""
    yield from dtype_misfits(weight.scale, weight.dtype)
    if weight.offset:
        yield Misfit("offsets", "quantizer@scheme.weight=lsq")


def restored(scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A stored scale as a model of `dtype` has it, in the narrowest dtype that holds all of it.

    Raises:
        InputError: if a scale is not positive and finite.
    """
    cast = scale.to(dtype)
    if not (torch.isfinite(cast).all() and (cast > 0).all()):
        raise InputError(f"{name} has scales that are not positive numbers.")
    if dtype != torch.float32:
        return cast
    narrow = (cast.to(d) for d in (torch.bfloat16, torch.float16) if torch.equal(cast.to(d).to(dtype), cast))
    return next(narrow, cast)
