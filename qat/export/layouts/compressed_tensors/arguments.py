"""How a compressed-tensors config spells a grid: its `QuantizationArgs`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qat.errors import InputError
from qat.numerics.granularity import Granularity, PerBlock, PerChannel, PerFlatGroup, PerGroup, PerTensor, PerToken


@dataclass(frozen=True)
class Arguments:
    """The grid of a weight or an input.

    Attributes:
        type: `int` or `float`.
        num_bits: of a code.
        strategy: who shares a scale: `tensor`, `channel`, `group`, `tensor_group`, `block` or `token`.
        group_size: of `group` and `tensor_group`.
        block_structure: rows and columns of `block`.
        symmetric: whether there is no zero point.
        dynamic: whether scales follow from the data.
        scale_dtype: what scales are rounded to; None for the dtype of the data.
    """

    type: str
    num_bits: int
    strategy: str
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: str | None = None

    @classmethod
    def read(cls, said: Mapping[str, Any], name: str) -> "Arguments":
        """What a config says of the layer `name`; what it leaves out has the library's defaults.

        Raises:
            InputError: where it says something that no grid here has.
        """
        try:
            size, blocks = said.get("group_size"), said.get("block_structure")
            strategy = said.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
            dynamic = said.get("dynamic") or False
            found = cls(
                str(said.get("type", "int")),
                int(said.get("num_bits", 8)),
                str(strategy),
                int(size) if size else None,
                (int(blocks[0]), int(blocks[1])) if blocks else None,
                bool(said.get("symmetric", True)),
                bool(dynamic),
                said.get("scale_dtype"),
            )
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise InputError(f"config.json is damaged where it tells the grid of {name} ({error!r}).") from error
        if said.get("actorder") in ("group", "dynamic", True):
            raise InputError(
                f"{name} has its columns in the order of their activations, which no grid here has: quantize the model "
                "again with actorder=null."
            )
        if dynamic not in (True, False):
            raise InputError(f"{name} has inputs that are dynamic within a group only (dynamic={dynamic}): refused.")
        return found

    def written(self) -> dict[str, Any]:
        """As a config says it."""
        always = {
            "num_bits": self.num_bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "dynamic": self.dynamic,
        }
        blocks = {"block_structure": list(self.block_structure)} if self.block_structure else {}
        return always | blocks | ({"scale_dtype": self.scale_dtype} if self.scale_dtype else {})

    def granularity(self, name: str) -> Granularity:
        """Who shares a scale.

        Raises:
            InputError: where no granularity here is like it.
        """
        plain: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerToken()}
        if self.strategy in plain:
            return plain[self.strategy]
        if self.strategy in ("group", "tensor_group") and self.group_size:
            return PerGroup(self.group_size)
        if self.strategy == "block" and self.block_structure:
            return PerBlock(*self.block_structure)
        raise InputError(f"{name} has scales by the strategy '{self.strategy}', which no grid here has.")


def sharing(granularity: Granularity) -> dict[str, Any]:
    """The arguments that say who shares a scale of a weight `[out, in]`, whose rows groups divide."""
    if isinstance(granularity, PerTensor):
        return {"strategy": "tensor"}
    if isinstance(granularity, PerBlock):
        return {"strategy": "block", "block_structure": (granularity.rows, granularity.columns)}
    if isinstance(granularity, PerGroup | PerFlatGroup):
        return {"strategy": "group", "group_size": granularity.group_size}
    return {"strategy": "channel"}


def dtype_of(spelled: str) -> torch.dtype:
    """`torch.bfloat16`, or `bfloat16`, as a dtype.

    Raises:
        InputError: if there is none.
    """
    dtype = getattr(torch, str(spelled).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"config.json names '{spelled}', which is no dtype of torch.")
    return dtype
