"""Tensors and options of a checkpoint, which others may have written: one clear error where they are not as said."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import InputError


def taken(
    tensors: Mapping[str, Tensor], leaf: str, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int | None]
) -> Tensor:
    """The tensor `leaf` of the layer `name`.

    Args:
        tensors: those of the layer, named without its name.
        dtypes: one of which it has.
        shape: of the tensor; None where a size is not known.

    Raises:
        InputError: if it is missing, or something else.
    """
    if leaf not in tensors:
        raise InputError(f"{name} has no tensor {leaf}: the checkpoint is damaged, fetch or export it again.")
    tensor = tensors[leaf]
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(f"{name}.{leaf} is {tensor.dtype}, not {expected}.")
    fits = len(shape) == tensor.ndim and all(a in (b, None) for a, b in zip(shape, tensor.shape, strict=True))
    if not fits:
        sizes = ", ".join("n" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name}.{leaf} is {list(tensor.shape)}, and by its other tensors and config.json it is [{sizes}]."
        )
    return tensor


def option(config: Mapping[str, Any], key: str, allowed: Sequence[Any] | type) -> Any:
    """What a `quantization_config` says of `key`, which must be one of `allowed`, or of that type.

    Raises:
        InputError: if it says nothing, or something else.
    """
    value = config.get(key)
    if isinstance(allowed, type):
        fits, expected = type(value) is allowed, allowed.__name__
    else:
        fits, expected = value in allowed, " or ".join(str(one) for one in allowed)
    if not fits:
        raise InputError(f"The quantization_config says {key}={value}; only {expected} can be read.")
    return value


def group_count(columns: int, size: int, name: str) -> int:
    """Groups of `size` in a row of the layer `name`; -1 for the whole row.

    Raises:
        InputError: if they do not divide it.
    """
    if size == -1:
        return 1
    if size < 1 or columns % size:
        raise InputError(f"{name} has {columns} columns, which groups of {size} do not divide.")
    return columns // size
