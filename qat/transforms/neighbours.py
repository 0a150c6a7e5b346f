"""Which module feeds which: where a scale can move from one to the other without changing what the model computes.

A norm feeds the linear layers that read its output; a linear layer feeds another through a path that is linear in
every channel (values through attention into the output projection, `up` through the gate into `down`). Both are found
by experiment, and taken only where a block whose source is scaled and whose targets undo it returns what it did.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.transforms.blocks import block_list
from qat.transforms.channels import (
    Norm,
    change_inputs_,
    change_outputs_,
    input_weight,
    norm_of,
    reads_channels,
    reinitialize_,
)
from qat.transforms.plain import full_precision
from qat.transforms.probe import Change, Changes, Probe, block_probes, model_probe

# Tokens to experiment with: sequences for proofs, and single ones, which attend to nothing but themselves, so that
# queries and keys make no difference.
_SEQUENCES, _SINGLES = (2, 6), (16, 1)
# Scales are powers of two, which change no mantissa: an error, as a share of what an undone scale changes, is then none
# in almost all models.
_TOLERANCE = 1e-3

Source = Norm | nn.Linear


@dataclass(frozen=True)
class Fold:
    """A source whose output channels all end up as input columns of the targets, each times something.

    Attributes:
        block: name of the block that all are in.
        name: of the source in the model.
        source: a norm or a linear layer.
        targets: linear layers, experts and routers, by name; whatever reads the source.
        columns: the channel of the source that each input column of the targets holds, `[in]`. Grouped-query attention
            repeats some, and a fused projection has channels that no column holds.
    """

    block: str
    name: str
    source: Source
    targets: dict[str, nn.Module]
    columns: Tensor

    @property
    def channels(self) -> int:
        """How many channels the source has."""
        return self.source.out_features if isinstance(self.source, nn.Linear) else len(self.source.gain)

    def by_channel(self, values: Tensor, reduce: str) -> Tensor:
        """`values` of every input column, `[in]`, as one of every channel: their `amax` or `mean`; 0 where none."""
        found = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
        return found.scatter_reduce_(0, self.columns.to(values.device), values, reduce, include_self=False)

    def only_read(self, scale: Tensor) -> Tensor:
        """`scale` of every channel that a column holds, 1 of the others."""
        return _only(self.columns.to(scale.device), scale)

    def fold_(self, scale: Tensor) -> None:
        """As `fold_scale_`, with a scale for each channel of the source."""
        fold_scale_(self.source, list(self.targets.values()), scale, self.columns)


@torch.no_grad()
def fold_scale_(source: Source, targets: Sequence[nn.Module], scale: Tensor, columns: Tensor | None = None) -> None:
    """Divide what `source` returns by `scale` and multiply the columns of `targets` that read it, in place.

    The model computes what it did. Quantizers of the weights that change are fitted anew, and static scales of their
    activations are dropped, see `reinitialize_`.

    Args:
        scale: positive, one for each channel of `source`.
        columns: the channel that each input column of the targets holds, `[in]`; None: they are the same. Channels that
            none of them holds are not scaled.

    Raises:
        InputError: if `scale` is not positive and finite.
    """
    scale = scale.double()
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise InputError("A scale to fold is zero, negative or not finite: clamp it to a positive minimum.")
    columns = torch.arange(len(scale), device=scale.device) if columns is None else columns.to(scale.device)
    scale = _only(columns, scale)
    divide_outputs_(source, scale)
    for target in targets:
        change_inputs_(target, lambda matrix: matrix * scale[columns])
    reinitialize_([*([source] if isinstance(source, nn.Linear) else []), *targets])


def divide_outputs_(source: Source, scale: Tensor) -> None:
    """Divide what `source` returns by `scale`, one for each channel, in place."""
    if isinstance(source, nn.Linear):
        change_outputs_(source, lambda matrix: matrix / scale[:, None])
    else:
        source.fill_(source.gain / scale, None if source.bias is None else source.bias / scale)


def neighbours(model: nn.Module) -> list[Fold]:
    """Every fold that can be proven in the blocks of `model`, in the order in which the targets run.

    Raises:
        InputError: if the model takes no tokens, or has no list of blocks with linear layers.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    prefix, blocks = block_list(model, linear)
    shared = _shared(model)
    with full_precision(model):
        proofs, singles = (block_probes(model_probe(model, *size), blocks) for size in (_SEQUENCES, _SINGLES))
    found = []
    with full_precision(model):
        for index, (proof, single) in enumerate(zip(proofs, singles, strict=True)):
            if proof is not None and single is not None:
                found += _Block(f"{prefix}.{index}", proof, single, shared).folds()
    return found


def proves(probe: Probe, outputs: Changes, inputs: Changes) -> bool:
    """Whether `inputs` of some modules undo all that `outputs` of others do to what the block returns."""
    clean = probe.run().output
    changed = (probe.run(outputs).output - clean).norm()
    return bool(changed > 0) and bool((probe.run(outputs, inputs).output - clean).norm() <= _TOLERANCE * changed)


class _Block:
    """The experiments on one block."""

    def __init__(self, name: str, proof: Probe, single: Probe, shared: set[int]) -> None:
        self._name, self._proof, self._single = name, proof, single
        self._names = {module: f"{name}.{path}" for path, module in proof.module.named_modules()}
        lone = [m for m in self._names if not any(id(p) in shared for p in m.parameters(recurse=False))]
        self._seen = proof.run(watch=[m for m in lone if m._parameters])
        self._readers = [m for m in self._seen.inputs if reads_channels(m)]

    def folds(self) -> list[Fold]:
        order = {module: place for place, module in enumerate(self._seen.inputs)}
        found = [*self._from_norms(), *self._from_linear()]
        by_name = {name: module for module, name in self._names.items()}
        return sorted(found, key=lambda fold: order[by_name[next(iter(fold.targets))]])

    def _from_norms(self) -> Iterable[Fold]:
        for module, output in self._seen.outputs.items():
            targets = [m for m in self._readers if is_same(self._seen.inputs[m], output)]
            norm = norm_of(module, self._seen.inputs[module]) if targets else None
            if norm is not None:
                yield from self._proven(module, norm, targets, torch.arange(output.shape[-1], device=output.device))

    def _from_linear(self) -> Iterable[Fold]:
        linear = [m for m in self._readers if isinstance(m, nn.Linear)]
        clean = self._single.run(watch=linear).inputs
        for place, module in enumerate(linear):
            doubled = self._single.run({module: _times(torch.tensor(2))}, watch=linear).inputs
            targets = [m for m in linear[place + 1 :] if clean[m].any() and _is_near(doubled[m], 2 * clean[m])]
            columns = [self._columns(module, target, clean[target]) for target in targets]
            if columns and columns[0] is not None and all(c is not None and c.equal(columns[0]) for c in columns):
                yield from self._proven(module, module, targets, columns[0])

    def _columns(self, source: nn.Linear, target: nn.Linear, clean: Tensor) -> Tensor | None:
        """The channel of `source` that each column of `target` holds: one bit of its number after the other is dyed."""
        channel = torch.arange(source.out_features, device=clean.device)
        before = clean.abs().flatten(0, -2).double().sum(0)
        columns = torch.zeros(target.in_features, dtype=torch.int64, device=clean.device)
        for bit in range((source.out_features - 1).bit_length()):
            dye = 1 + (channel >> bit & 1)
            seen = self._single.run({source: _times(dye)}, watch=[target]).inputs[target]
            ratio = seen.abs().flatten(0, -2).double().sum(0) / before
            if not ((ratio - ratio.round()).abs() < _TOLERANCE).all() or ratio.min() < 1 or ratio.max() > 2:
                return None
            columns |= (ratio.round().long() - 1) << bit
        return columns if columns.max() < source.out_features else None

    def _proven(
        self, module: nn.Module, source: Source, targets: Sequence[nn.Module], columns: Tensor
    ) -> Iterable[Fold]:
        """The fold, if the block stays as it was, and what is no linear layer reads with the matrix that it shows."""
        channels = self._seen.outputs[module].shape[-1]
        generator = torch.Generator().manual_seed(0)
        scale = 2.0 ** torch.randint(-1, 2, (channels,), generator=generator).to(columns.device)
        scale = _only(columns, scale)
        undo = {target: _times(scale[columns]) for target in targets}
        shown = all(isinstance(m, nn.Linear) or self._reads_as_it_shows(m, scale) for m in targets)
        if shown and proves(self._proof, {module: _times(1 / scale)}, undo):
            names = {self._names[target]: target for target in targets}
            yield Fold(self._name, self._names[module], source, names, columns)

    def _reads_as_it_shows(self, module: nn.Module, scale: Tensor) -> bool:
        """Whether scaling the matrix of `module` is scaling its input."""
        clean = self._proof.run().output
        own = input_weight(module)
        saved = own.detach().clone()
        try:
            change_inputs_(module, lambda matrix: matrix * scale)
            changed = (self._proof.run().output - clean).norm()
            undone = self._proof.run(inputs={module: _times(1 / scale)}).output
        finally:
            own.data.copy_(saved)
        return bool(changed > 0) and bool((undone - clean).norm() <= _TOLERANCE * changed)


def _times(factor: Tensor) -> Change:
    return lambda x: x * factor.to(x)


def _only(columns: Tensor, scale: Tensor) -> Tensor:
    """`scale` where a column reads the channel, 1 elsewhere."""
    read = torch.zeros_like(scale, dtype=torch.bool)
    read[columns] = True
    return torch.where(read, scale, torch.ones_like(scale))


def is_same(x: Tensor, y: Tensor) -> bool:
    """Whether both look at the same memory with the same channels last."""
    if x.shape[-1:] != y.shape[-1:] or x.numel() != y.numel() or not x.is_floating_point():
        return False
    return x.data_ptr() == y.data_ptr()


def _is_near(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() <= _TOLERANCE * y.norm())


def _shared(model: nn.Module) -> set[int]:
    """Parameters, by id, that more than one module uses."""
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    return {each for each in uses if uses.count(each) > 1}
