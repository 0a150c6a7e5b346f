"""What flows into the linear layers of a block."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qat.nn import QuantLinear
from qat.quantizers import Quantizer
from qat.transforms.blocks import Block

# Layers of a block, by their names in it, that multiply the same tensor: queries, keys and values.
Group = dict[str, QuantLinear]


def inputs(block: Block, layers: Group | None = None) -> list[Group]:
    """`layers` of `block`, grouped by input, in the order in which they run.

    Layers that the first batch does not reach, such as an expert's, come last and alone.

    Args:
        layers: by their names in the block; None: the linear layers whose weights are quantized.
    """
    if layers is None:
        layers = quantized_linears(block.module)
    seen: dict[int, tuple[Tensor, Group]] = {}

    def note(name: str, own: QuantLinear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            # The tensor is held, so that no other can take its place in memory and look like it.
            _, group = seen.setdefault(id(args[0]), (args[0], {}))
            group[name] = own

        return hook

    _run(block, block.calls[:1], {name: (layer, note(name, layer)) for name, layer in layers.items()})
    groups = [group for _, group in seen.values()]
    reached = {name for group in groups for name in group}
    return groups + [{name: layer} for name, layer in layers.items() if name not in reached]


def hessians(block: Block, groups: Sequence[Group]) -> list[Tensor]:
    """X^T X of the inputs of each of `groups`, `[in, in]` in float32, over all calls of `block`."""
    return _sums(block, groups, 2, lambda total, x: total.addmm_(x.t(), x))


def squares(block: Block, groups: Sequence[Group]) -> list[Tensor]:
    """The diagonals of `hessians`, `[in]` each: the sum of the squares of every input feature."""
    return _sums(block, groups, 1, lambda total, x: total.add_(x.square().sum(0)))


def _sums(block: Block, groups: Sequence[Group], rank: int, add: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """For each of `groups` a tensor of `rank` dimensions, to which `add` has added every input `[tokens, in]`."""
    leaders = [next(iter(group.values())) for group in groups]
    sums = [torch.zeros((layer.in_features,) * rank, device=block.device) for layer in leaders]

    def add_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            add(total, args[0].flatten(0, -2).to(torch.float32))

        return hook

    _run(block, block.calls, {str(i): (leaders[i], add_to(total)) for i, total in enumerate(sums)})
    return sums


def magnitudes(block: Block, modules: Sequence[nn.Module], largest: bool = False) -> list[Tensor]:
    """Mean of |x|, or its maximum, over all that each of `modules` is given, `[in]` in float32, over all calls."""
    sums: dict[int, Tensor] = {}
    counts = [0] * len(modules)

    def gather(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).to(torch.float32).abs()
            counts[index] += len(x)
            own = x.amax(0) if largest else x.sum(0)
            before = sums.get(index, torch.zeros_like(own))
            sums[index] = torch.maximum(before, own) if largest else before + own

        return hook

    _run(block, block.calls, {str(i): (module, gather(i)) for i, module in enumerate(modules)})
    return [sums[i] if largest else sums[i] / counts[i] for i in range(len(modules))]


def quantized_linears(module: nn.Module) -> Group:
    """The linear layers within `module` whose weights get codes, by their names in it."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantLinear) and is_quantized_linear(m)}


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer whose weight gets codes."""
    return isinstance(module, QuantLinear) and isinstance(module.weight_quantizer, Quantizer)


def _run(block: Block, calls: Sequence, hooks: dict[str, tuple[nn.Module, Callable]]) -> None:
    handles = [layer.register_forward_pre_hook(hook) for layer, hook in hooks.values()]
    try:
        for call in calls:
            block.run(call)
    finally:
        for handle in handles:
            handle.remove()
