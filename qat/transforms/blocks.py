"""Walk through the blocks of a model one after the other, with the data that flows into each.

Methods that look at activations (GPTQ, AWQ, rounding by gradient) need the inputs of one block at a time, as the
blocks before it, quantized already, make them. So a model of any size needs the memory of one block on the device, and
of the hidden states of the calibration data off it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.numerics.finite import all_finite
from qat.transforms.broken import MADE_NAN, broken_module
from qat.transforms.finished import Finished, fingerprint
from qat.transforms.layers import quant_layers
from qat.transforms.plain import full_precision

if TYPE_CHECKING:
    from rich.progress import Progress

_NO_BLOCKS = (
    "{kind} has no list of blocks (an nn.ModuleList, such as model.layers) with quantized layers in it, which this "
    "transform goes through one by one: prepare it with a scheme that quantizes some, or leave the transform out."
)


@dataclass(frozen=True)
class Call:
    """One call of a block: its hidden states `[batch, tokens, features]`, and whatever else it is given."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Block:
    """One block on the device it computes on, and the calls that calibration makes of it.

    Attributes:
        name: as in `model.named_modules()`.
        index, count: which of how many blocks it is.
        calls: a call for each batch, held on `home`.
        targets: for each call the hidden states that leave the block where nothing was quantized, in it or before it;
            none where the walk was not asked for them.
    """

    name: str
    module: nn.Module
    index: int
    count: int
    calls: list[Call]
    device: torch.device
    targets: Sequence[Tensor] = ()

    def run(self, call: Call) -> Tensor:
        """The hidden states that leave the block."""
        hidden, args, kwargs = _moved((call.hidden, call.args, call.kwargs), self.device)
        output = self.module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


Work = Callable[[Block], None]


def block_list(model: nn.Module, layers: Iterable[str] | None = None) -> tuple[str, nn.ModuleList]:
    """The list of blocks that `model` consists of, and its name: the outermost one that holds most of `layers`.

    Args:
        layers: names of layers; None takes the quantized ones.

    Raises:
        InputError: if there is none.
    """
    found = find_blocks(model, [name for name, _ in quant_layers(model)] if layers is None else layers)
    if found is None:
        raise InputError(_NO_BLOCKS.format(kind=type(model).__name__))
    return found


def find_blocks(model: nn.Module, layers: Iterable[str]) -> tuple[str, nn.ModuleList] | None:
    """The same, or None where no list of blocks holds one of `layers`."""
    names = list(layers)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    held = {name: sum(layer.startswith(f"{name}.") for layer in names) for name, _ in lists}
    best = max(lists, key=lambda entry: held[entry[0]], default=None)
    return None if best is None or not held[best[0]] else best


def walk(
    model: nn.Module,
    batches: Iterable[Any],
    work: Work,
    title: str,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
    key: str = "",
    blocks: tuple[str, nn.ModuleList] | None = None,
    with_targets: bool = False,
) -> None:
    """Call `work` for every block in turn; each sees the outputs of the finished ones before it.

    Args:
        model: prepared; its blocks are modules of one nn.ModuleList, called with hidden states first.
        batches: mappings, passed to the model as keywords.
        work: changes its block in place.
        title: of the progress bar.
        device: where blocks compute; they go back to where they were. Default: where the model is.
        folder: where finished blocks are kept, so that a walk that was killed goes on; None keeps none. They stay when
            all are done, for the model is not saved yet: `discard(folder)` then.
        key: what the result depends on beside the model and the data; blocks of another key are not taken up.
        blocks: their name and their list, for a model that was not prepared; None finds them.
        with_targets: also carry the hidden states of the model in full precision, as the targets of each block.

    Raises:
        InputError: if the model has no blocks, there are no batches, a layer makes NaN of them, or there is no such
            device.
    """
    name, stack = block_list(model) if blocks is None else blocks
    home = next(model.parameters()).device
    device = home if device is None else _usable(device)
    was_training = model.training
    model.eval()
    try:
        calls = _first_calls(model, stack, batches)
        if not all(all_finite(call.hidden) for call in calls[0]):
            raise InputError(MADE_NAN.format(where=f"What comes before {name}.0"))
        finished = Finished(folder, f"{key}|{fingerprint(model, (call.hidden for call in calls[0]))}")
        targets: Sequence[Tensor] = [call.hidden for call in calls[0]] if with_targets else ()
        with progress_bar() as progress:
            task = progress.add_task(title, total=len(stack))
            for index, module in enumerate(stack):
                block = Block(f"{name}.{index}", module.to(device), index, len(stack), calls[index], device)
                targets = block.targets = targets_of(block, targets)
                if not finished.restore(index, module):
                    work(block)
                    finished.keep(index, module)
                module.to(device)  # what was restored may hold tensors that it did not hold before
                if index + 1 < len(stack):
                    _pass_on(block, calls)
                module.to(home)
                progress.update(task, completed=index + 1)
    finally:
        model.train(was_training)


@torch.no_grad()
def _pass_on(block: Block, calls: list[list[Call]]) -> None:
    """Run `block` and hand its outputs to the next one; what only it needed is freed."""
    following = calls[block.index + 1]
    for i, call in enumerate(block.calls):
        hidden = _finite_output(block, call)
        following[i] = Call(hidden, following[i].args, following[i].kwargs)
    calls[block.index] = []


@torch.no_grad()
def targets_of(block: Block, hidden: Sequence[Tensor]) -> Sequence[Tensor]:
    """What leaves `block` in full precision where `hidden`, of each call, enters it."""
    with full_precision(block.module):
        pairs = zip(block.calls, hidden, strict=False)  # there may be none
        return [_finite_output(block, replace(call, hidden=own)) for call, own in pairs]


def _finite_output(block: Block, call: Call) -> Tensor:
    """The hidden states that leave `block`, on the device of those that enter it."""
    hidden = block.run(call).to(call.hidden.device)
    if not all_finite(hidden):
        refuse_broken(block, [call])
    return hidden


def refuse_broken(block: Block, calls: Iterable[Call]) -> None:
    """Refuse `calls` of which a module of `block` makes NaN or infinity, by the name of the first that does.

    Raises:
        InputError: if there is one.
    """
    for call in calls:
        name = broken_module(block.module, partial(block.run, call))
        if name is not None:
            raise InputError(MADE_NAN.format(where=".".join(filter(None, (block.name, name)))))


def _usable(device: torch.device | str) -> torch.device:
    """A device that tensors can go to."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an assertion where torch was built without it
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Nothing computes on device '{device}' ({reason}): set device to null, cpu or cuda."
        ) from error


class _Stop(Exception):
    """Everything that a forward pass was for has been seen."""


@torch.no_grad()
def _first_calls(model: nn.Module, blocks: nn.ModuleList, batches: Iterable[Any]) -> list[list[Call]]:
    """The calls of every block; only those of the first have the right hidden states yet.

    The model runs with its blocks bridged, so that it costs no more than its embedding; what it gives each block beside
    the hidden states (masks, rotary angles, which differ from block to block in some models) is recorded.
    """
    calls: list[list[Call]] = [[] for _ in blocks]
    for own, block in zip(calls, blocks, strict=True):
        block.forward = partial(_record, own, own is calls[-1])
    try:
        for batch in batches:
            try:
                model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
            except _Stop:
                continue
    finally:
        for block in blocks:
            del block.forward
    if not calls[0]:
        raise InputError("There are no calibration batches: set calibration_batches to 1 or more.")
    return calls


def _record(calls: list[Call], is_last: bool, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a block's forward: note the call, and hand the hidden states on as they are."""
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)
    calls.append(Call(hidden, tuple(others), kwargs))
    if is_last:
        raise _Stop
    return hidden


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def progress_bar() -> "Progress":
    """Shows how many of how many are done, and the time that remains."""
    # Only now: it takes as long to import as all of this package.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, transient=True)
