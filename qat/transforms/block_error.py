"""How far what leaves a block is from what leaves it in full precision, and the gradient of that."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.transforms.blocks import Block


@torch.no_grad()
def block_error(block: Block) -> float:
    """The mean squared error of what leaves `block`, summed over all its calls; the walk carries targets."""
    return sum(float(_call_error(block, call)) for call in range(len(block.calls)))


@torch.enable_grad()
def gradients(block: Block, parameters: Sequence[Tensor], calls: Sequence[int]) -> dict[Tensor, Tensor]:
    """Of the error on `calls`, by parameter; none flows into what they do not reach, as an expert's layer."""
    sums = {parameter: torch.zeros_like(parameter) for parameter in parameters}
    for call in calls:
        found = torch.autograd.grad(_call_error(block, call), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sums[parameter] += gradient
    return sums


class Drawn:
    """Calls of a block for each step of gradient descent, drawn by the block alone, so that a killed run can go on.

    Args:
        batch_size: sequences a step; at least those of one call are taken.
    """

    def __init__(self, block: Block, batch_size: int) -> None:
        self._of, self._size = len(block.calls), max(1, batch_size // len(block.calls[0].hidden))
        self._generator = torch.Generator().manual_seed(block.index)

    def __call__(self) -> list[int]:
        taken: list[int] = torch.randperm(self._of, generator=self._generator)[: self._size].tolist()
        return taken


def _call_error(block: Block, call: int) -> Tensor:
    """Mean squared error of what leaves the block in one call."""
    output = block.run(block.calls[call]).to(torch.float32)
    return (output - block.targets[call].to(output)).square().mean()
