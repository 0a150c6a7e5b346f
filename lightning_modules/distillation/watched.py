"""What modules inside of a model put out, seen during one forward pass, and pairs of them in student and teacher."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.errors import InputError
from qat.transforms.blocks import find_blocks


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what `modules` put out within, of tuples the first.

    The hooks are gone when the backward pass computes checkpointed blocks again.
    """
    found: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of `model`, plain or prepared.

    Raises:
        InputError: if it has none.
    """
    found = find_blocks(model, [name for name, module in model.named_modules() if module._parameters])
    if found is None:
        raise InputError(
            f"distill.hidden and distill.attention compare blocks, and {type(model).__name__} has no list of them: "
            "set their weights to 0."
        )
    return found[1]


def paired_blocks(
    option: str, indices: Sequence[int] | None, student: nn.Module, teacher: nn.Module
) -> list[tuple[nn.Module, nn.Module]]:
    """Blocks of the student and those of the teacher at the same share of its depth.

    Args:
        option: where `indices` were given, for messages.
        indices: of the student's blocks, negative ones from the end; None: all.

    Raises:
        InputError: if there is no such block.
    """
    own, theirs = blocks_of(student), blocks_of(teacher)
    indices = range(len(own)) if indices is None else indices
    if not isinstance(indices, Sequence) or isinstance(indices, str) or not len(indices):
        raise InputError(f"{option} is {indices}; it is a list of blocks: set it to [-1], the last one.")
    pairs = []
    for index in indices:
        if not isinstance(index, int) or not -len(own) <= index < len(own):
            raise InputError(f"{option} has {index}, and the blocks are 0 to {len(own) - 1}: set it to [-1], the last.")
        depth = index % len(own) + 1
        pairs.append((own[index], theirs[round(depth * len(theirs) / len(own)) - 1]))
    return pairs
