"""Which module of a model makes NaN or infinity of its data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat.numerics.finite import all_finite
from qat.quantizers.mask import Masked

# What is said of it.
MADE_NAN = (
    "{where} made NaN or infinity of the calibration data: look at its weights; a model in float16 may need bfloat16."
)


@torch.no_grad()
def broken_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name within `model` of the first module that returns NaN or infinity while `run` calls it, if one does."""
    broken: list[str] = []

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not all_finite(tensor):
            broken.append(name)

    # A quantizer hands on what its layer made.
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, Masked)}
    handles = [module.register_forward_hook(partial(note, name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else None
