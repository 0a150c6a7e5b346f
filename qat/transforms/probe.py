"""Experiments on a block: change what its modules are given or return, and see what comes of it.

Whether one module feeds another, and how, is found out here and not read off names. Nothing in the model changes: all
happens in hooks, on a few random tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError

Change = Callable[[Tensor], Tensor]
Changes = Mapping[nn.Module, Change]

_NO_EMBEDDING = (
    "{kind} has no input embedding that transformers knows of (get_input_embeddings), so it takes no tokens."
)


@dataclass
class Seen:
    """What passed by in one run: the output, and of every watched module what it was given and returned, in order."""

    output: Tensor = field(default_factory=lambda: torch.empty(0))
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A module and one call of it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @torch.no_grad()
    def run(self, outputs: Changes | None = None, inputs: Changes | None = None, watch: Iterable[Any] = ()) -> Seen:
        """Make the call, with `outputs` and `inputs` of some modules changed on their way; tensors seen are held."""
        seen = Seen()
        hooks = [m.register_forward_pre_hook(_given(f), with_kwargs=True) for m, f in (inputs or {}).items()]
        hooks += [m.register_forward_hook(_returned(f)) for m, f in (outputs or {}).items()]
        hooks += [m.register_forward_hook(_note(seen), with_kwargs=True) for m in watch]
        with _hooked(hooks):
            output = self.module(*self.args, **self.kwargs)
        seen.output = tensor_of(getattr(output, "logits", output))
        return seen


def model_probe(model: Any, sequences: int, length: int) -> Probe:
    """A call of `model` with random tokens `[sequences, length]`.

    Raises:
        InputError: if it takes no tokens.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        raise InputError(_NO_EMBEDDING.format(kind=type(model).__name__))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.weight.shape[0], (sequences, length), generator=generator)
    return Probe(model, (), {"input_ids": ids.to(embedding.weight.device), "use_cache": False})


def block_probes(whole: Probe, blocks: Iterable[nn.Module]) -> list[Probe | None]:
    """The call of each of `blocks` that `whole` makes; None for one that is not called, or more than once."""
    calls: dict[nn.Module, list[Probe]] = {block: [] for block in blocks}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[block].append(Probe(block, args, kwargs))

    with _hooked(block.register_forward_pre_hook(note, with_kwargs=True) for block in calls):
        whole.run()
    return [made[0] if len(made) == 1 else None for made in calls.values()]


def tensor_of(value: Any) -> Tensor:
    """`value`, or the first tensor in it."""
    if isinstance(value, Tensor):
        return value
    entries = value.values() if isinstance(value, Mapping) else value
    return next((entry for entry in entries if isinstance(entry, Tensor)), torch.empty(0))


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks, removed in the end."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


def _given(change: Change) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook that changes the first tensor that a module is given."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        first = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, kwargs | {first: change(kwargs[first])}

    return hook


def _returned(change: Change) -> Callable[..., Tensor]:
    return lambda _, args, output: change(output)


def _note(seen: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.inputs[module] = tensor_of((*args, *kwargs.values()))
        seen.outputs[module] = tensor_of(output)

    return hook
