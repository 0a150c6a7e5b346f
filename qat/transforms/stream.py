"""The residual stream of a model: who writes into it, and who reads it through a norm.

Embeddings and the last layer of every branch add to the stream; norms hand it to the first layers of every branch and
to the output head. An orthogonal matrix that all of them take up leaves the function as it is. Who they are is found by
experiment, and the whole is proven before anything changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError
from qat.transforms.blocks import block_list
from qat.transforms.channels import Norm, is_embedding, norm_of, written
from qat.transforms.neighbours import Fold, is_same, neighbours
from qat.transforms.plain import full_precision
from qat.transforms.probe import Change, Probe, block_probes, model_probe

# Logits of a model in float32, and in 16 bits, of which the hooks of the proof take some.
_TOLERANCE, _TOLERANCE_16 = 1e-3, 5e-2
_NO_PROOF = (
    "The residual stream of {kind} does not rotate: {why}. Leave out transforms=rotate; smoothquant and awq need none."
)


@dataclass(frozen=True)
class Reading:
    """A norm on the stream, and the modules that read what it returns."""

    norm: Norm
    readers: list[nn.Module]


@dataclass(frozen=True)
class Stream:
    """What an orthogonal matrix of the residual stream goes into.

    Attributes:
        size: number of channels.
        readings: norms and their readers, the output head among them.
        writers: embeddings, linear layers and experts whose outputs are added to the stream.
        folds: what else `neighbours` found.
    """

    size: int
    readings: list[Reading]
    writers: list[nn.Module]
    folds: list[Fold]

    @property
    def centers(self) -> bool:
        """Whether a norm takes off the mean, which a rotation of the stream has to keep then."""
        return any(reading.norm.centers for reading in self.readings)


def find_stream(model: Any) -> Stream:
    """The residual stream of `model`.

    Raises:
        InputError: if the model takes no tokens, or has no output head that a norm feeds.
    """
    kind = type(model).__name__
    whole = model_probe(model, 2, 6)
    size = model.get_input_embeddings().weight.shape[1]
    head = model.get_output_embeddings()
    folds = neighbours(model)
    with full_precision(model):
        _, blocks = block_list(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)])
        inside = {module for block in blocks for module in block.modules()}
        outside = [m for m in model.modules() if m not in inside and m._parameters]
        seen = whole.run(watch=outside)
        before_head = [m for m in seen.outputs if m is not head and is_same(seen.outputs[m], seen.inputs[head])]
        found = (norm_of(module, seen.inputs[module]) for module in before_head)
        last = next((norm for norm in found if norm is not None), None)
        if last is None:
            raise InputError(_NO_PROOF.format(kind=kind, why="no norm could be found that feeds its output head"))
        norms = [f for f in folds if isinstance(f.source, Norm) and f.channels == size]
        writers = [m for m in seen.outputs if is_embedding(m) and written(m) == size]
        for probe in block_probes(whole, blocks):
            if probe is not None:
                writers += _block_writers(probe, [_norm(f).module for f in norms], size)
    readings = [Reading(_norm(f), list(f.targets.values())) for f in norms]
    return Stream(size, [*readings, Reading(last, [head])], writers, folds)


def require_proof(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    """Refuse a `stream` that `rotation` `[size, size]` would not leave the function of: tried out in hooks.

    Raises:
        InputError: if the logits change.
    """
    probe = model_probe(model, 2, 6)
    outputs = {writer: _through(rotation) for writer in stream.writers}
    inputs: dict[nn.Module, Change] = {}
    for reading in stream.readings:
        gain, bias = reading.norm.gain, reading.norm.bias
        inputs |= {reader: _through(rotation.T, gain, bias) for reader in reading.readers}
    with full_precision(model):
        clean = probe.run().output
        with _without_gains(stream):
            rotated = probe.run(outputs, inputs).output
    tolerance = _TOLERANCE if clean.dtype.itemsize > 2 else _TOLERANCE_16
    error = float((rotated.double() - clean.double()).norm() / (clean.double() - clean.double().mean(-1, True)).norm())
    if not error <= tolerance:
        why = f"turning it moves the logits by {error:.1%}; norms between a branch and the stream (as in Gemma) do that"
        raise InputError(_NO_PROOF.format(kind=type(model).__name__, why=why))


def _block_writers(probe: Probe, norms: list[nn.Module], size: int) -> Iterator[nn.Module]:
    """Modules of a block whose output reaches the stream as it is, or times a number for each token."""
    own = [m for m in probe.module.modules() if m in norms]
    candidates = [m for m in probe.module.modules() if written(m) == size and not is_embedding(m)]
    clean = probe.run(watch=[*own, *candidates])
    generator = torch.Generator().manual_seed(0)
    for module in candidates:
        output = clean.outputs.get(module)
        if output is None or output.numel() != clean.output.numel():
            continue
        scale = output.float().std().clamp(min=1e-3)
        added = torch.randn(output.shape, generator=generator).to(output) * scale.to(output)
        changed = probe.run({module: added.add}, watch=own)
        points = [(changed.inputs[norm], clean.inputs[norm]) for norm in changed.inputs]
        if _arrives([*points, (changed.output, clean.output)], added):
            yield module


def _arrives(points: list[tuple[Tensor, Tensor]], added: Tensor) -> bool:
    """Whether the first of `points`, each after and before, that changes does so by a multiple of `added` per token."""
    added = added.flatten(0, -2).double()
    for after, before in points:
        difference = (after.double() - before.double()).view_as(added)
        if difference.norm() <= _TOLERANCE * added.norm():
            continue
        factor = (difference * added).sum(-1, True) / added.square().sum(-1, True)
        tolerance = _TOLERANCE if after.dtype.itemsize > 2 else _TOLERANCE_16
        return bool((difference - factor * added).norm() <= tolerance * difference.norm())
    return False


def _through(rotation: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Change:
    """x -> (x @ rotation) * gain + bias."""

    def change(x: Tensor) -> Tensor:
        y = x.double() @ rotation.to(x.device)
        y = y if gain is None else y * gain
        return (y if bias is None else y + bias).to(x.dtype)

    return change


@contextmanager
def _without_gains(stream: Stream) -> Iterator[None]:
    """All norms of the stream with a gain of one and no bias, for a while."""
    saved = [[p.detach().clone() for p in reading.norm.module.parameters()] for reading in stream.readings]
    try:
        for reading in stream.readings:
            gain, bias = reading.norm.gain, reading.norm.bias
            reading.norm.fill_(torch.ones_like(gain), None if bias is None else torch.zeros_like(bias))
        yield
    finally:
        for reading, tensors in zip(stream.readings, saved, strict=True):
            for parameter, tensor in zip(reading.norm.module.parameters(), tensors, strict=True):
                parameter.data.copy_(tensor)


def _norm(fold: Fold) -> Norm:
    assert isinstance(fold.source, Norm)
    return fold.source
