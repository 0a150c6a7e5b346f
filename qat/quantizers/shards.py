"""Weights that FSDP2 has spread over processes."""

from torch import Tensor

from qat.errors import InputError


def refuse_shards(x: Tensor) -> None:
    """Refuse to find the grid of a tensor of which this process holds a part: groups and codebooks cross the parts.

    Raises:
        InputError: if x is a DTensor.
    """
    if hasattr(x, "full_tensor"):  # its class takes long to import
        raise InputError(
            f"A tensor {list(x.shape)} is sharded by FSDP2, and whole only in the forward pass of its block: prepare "
            "and calibrate before qat.shard(model), and convert a model that loaded the full state dict."
        )
