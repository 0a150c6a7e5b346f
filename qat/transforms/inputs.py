"""What flows into the linear layers of a block."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.nn import QuantLinear
from qat.numerics.finite import all_finite
from qat.quantizers import Quantizer
from qat.transforms.blocks import Block, refuse_broken

# Layers of a block, by their names in it, that multiply the same tensor: queries, keys and values.
Group = dict[str, QuantLinear]
# Adds one input `[tokens, in]` to a total, in place.
Add = Callable[[Tensor, Tensor], Tensor]


def hessians(block: Block, layers: Group | None = None) -> list[tuple[Group, Tensor]]:
    """`layers` of `block`, grouped by input, with the X^T X of that over all calls, `[in, in]` in float32.

    Groups come in the order in which they run; layers that nothing reaches, such as an expert's, last and alone.

    Args:
        layers: by their names in the block; None: the linear layers whose weights are quantized.

    Raises:
        InputError: if a layer of the block makes NaN or infinity of what it is given.
    """
    return _sums(block, layers, 2, lambda total, x: total.addmm_(x.t(), x))


def squares(block: Block, layers: Group | None = None) -> list[tuple[Group, Tensor]]:
    """The same with the diagonals of X^T X, `[in]`: the sum of the squares of every input feature."""
    return _sums(block, layers, 1, lambda total, x: total.add_(x.square().sum(0)))


def _sums(block: Block, layers: Group | None, rank: int, add: Add) -> list[tuple[Group, Tensor]]:
    sums = _Sums(rank, add, block.device)
    layers = quantized_linears(block.module) if layers is None else layers
    for call in block.calls:
        _run(block, [call], {name: (layer, partial(sums.note, name)) for name, layer in layers.items()})
        sums.forget()
    for name, layer in layers.items():
        if name not in sums.group_of:
            sums.join(name, layer, None)
    _require_finite(block, [total for _, total in sums.found])
    return sums.found


def _require_finite(block: Block, found: Sequence[Tensor]) -> None:
    """Refuse what was found of activations that hold NaN or infinity, or whose squares overflow."""
    if all(map(all_finite, found)):
        return
    refuse_broken(block, block.calls)
    raise InputError(f"{block.name}: the squares of what its layers are given overflow float32: look at its weights.")


class _Sums:
    """Groups of layers, each with a tensor of `rank` dimensions to which `add` adds every input `[tokens, in]`."""

    def __init__(self, rank: int, add: Add, device: torch.device) -> None:
        self.found: list[tuple[Group, Tensor]] = []
        self.group_of: dict[str, int] = {}
        self._rank, self._add, self._device = rank, add, device
        # Tensors of the call, held so that no other can take the place of one in memory and look like it.
        self._seen: dict[int, tuple[Tensor, int]] = {}

    def note(self, name: str, layer: QuantLinear, args: tuple[Tensor, ...]) -> None:
        """A hook of a layer; the first of each group adds what all are given."""
        x = args[0]
        if name not in self.group_of:
            self.join(name, layer, x)
        group, total = self.found[self.group_of[name]]
        if name == next(iter(group)):
            self._seen[id(x)] = x, self.group_of[name]
            self._add(total, x.flatten(0, -2).to(torch.float32))

    def join(self, name: str, layer: QuantLinear, x: Tensor | None) -> None:
        """Find the group of a layer, or make it one: that of the layers that were given `x` in the same call."""
        _, self.group_of[name] = self._seen.get(id(x), (x, len(self.found)))
        if self.group_of[name] == len(self.found):
            self.found.append(({}, torch.zeros((layer.in_features,) * self._rank, device=self._device)))
        self.found[self.group_of[name]][0][name] = layer

    def forget(self) -> None:
        """The call is over."""
        self._seen.clear()


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
    _require_finite(block, list(sums.values()))
    return [sums[i] if largest else sums[i] / counts[i] for i in range(len(modules))]


@torch.no_grad()
def running_order(block: Block) -> Group:
    """The linear layers of `block` with quantized weights that its calls reach, in the order in which they run."""
    found: Group = {}

    def note(name: str, layer: QuantLinear, *_: object) -> None:
        found.setdefault(name, layer)

    layers = quantized_linears(block.module)
    _run(block, block.calls, {name: (layer, partial(note, name)) for name, layer in layers.items()})
    return found


@torch.no_grad()
def inputs_of(block: Block, layer: nn.Module) -> list[Tensor]:
    """All that `layer` of `block` is given in its calls, held where these are."""
    found: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].to(block.calls[0].hidden.device))

    _run(block, block.calls, {"": (layer, keep)})
    return [x for x in found if x.numel()]  # an expert may be given no token


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
