"""Models whose weights FSDP2 spreads over processes."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from qat.errors import InputError
from qat.quantizers import Quantizer
from qat.transforms.blocks import block_list


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Spread the weights of a prepared `model` over the processes, a group for every block and one for the rest.

    FSDP2 wants one dtype in a group and casts all of it alike. What quantizers learn is float32 and must stay so, or
    training would see another grid than the one that ships: it is small, so every process holds it whole, and its
    gradients are averaged as they come. (PyTorch FSDP, arXiv 2304.11277.)

    Args:
        model: prepared and calibrated, the same in every process; changed in place.
        options: of `torch.distributed.fsdp.fully_shard`, such as `mesh` and `mp_policy`.

    Returns:
        The model. Its gradients are means over the processes.

    Raises:
        InputError: if no block holds a quantized layer, or the mesh has several dimensions.
    """
    from torch.distributed.fsdp import fully_shard  # takes long

    mesh = options.get("mesh")
    if mesh is not None and mesh.ndim > 1:
        raise InputError(
            f"The mesh has {mesh.ndim} dimensions, and gradients of scales and codebooks are averaged over one: give a "
            "mesh of one dimension, which all processes are in."
        )

    _, blocks = block_list(model)
    whole = {p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    for module in (*blocks, model):
        fully_shard(module, ignored_params=whole, **options)
    group = None if mesh is None else mesh.get_group(0)
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: _average(p.grad, group))
    return model


def _average(gradient: Tensor | None, group: dist.ProcessGroup | None) -> None:
    """The mean over the processes, in place. What earlier batches left is equal everywhere, and so stays itself."""
    assert gradient is not None
    gradient /= dist.get_world_size(group)
    dist.all_reduce(gradient, group=group)
