"""What transforms do to the modules of a model, beside its numbers."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from qat.transforms.autoround import autoround
from qat.transforms.gptq import fix_scales, gptq
from qat.transforms.hadamard import rotate, untie

_STRUCTURE = {gptq: fix_scales, autoround: fix_scales, rotate: untie}


def restructure(model: nn.Module, transforms: Iterable[Any]) -> nn.Module:
    """Give a prepared `model` the modules and Parameters that it has after `transforms`, whose numbers are loaded then.

    A checkpoint of a run knows what its transforms computed, but not that they gave the output head a weight of its
    own or held a scale: before it is loaded, the model has to have a place for that.

    Args:
        transforms: functions of `qat.transforms`, or `functools.partial` of them.

    Returns:
        `model`.
    """
    for transform in transforms:
        change = _STRUCTURE.get(getattr(transform, "func", transform))
        if change is not None:
            change(model)
    return model
