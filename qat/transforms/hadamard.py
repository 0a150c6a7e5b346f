"""Rotations: the same function in other axes, in which no channel stands out."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import InputError, nearest
from qat.nn import QuantLayer
from qat.numerics.hadamard import mean_keeping, orthogonal, rotation
from qat.transforms.channels import change_inputs_, change_outputs_, reinitialize_
from qat.transforms.learned_rotation import learned_rotation
from qat.transforms.neighbours import Fold, proves
from qat.transforms.plain import full_precision
from qat.transforms.probe import Change, Probe, block_probes, model_probe
from qat.transforms.stream import Reading, Stream, find_stream, require_proof

_KINDS = {"hadamard": rotation, "orthogonal": orthogonal}


def rotate(
    model: nn.Module,
    batches: Iterable[Any] = (),
    kind: str = "hadamard",
    heads: bool = True,
    seed: int = 0,
    steps: int = 0,
    rate: float = 1.5,
) -> nn.Module:
    """Rotate the residual stream, and the values within each head; the function stays as it is.

    Gains of norms go into the layers that follow, then every layer that reads the stream is multiplied by an orthogonal
    Q and every one that writes it by Q^T (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024). Outliers of channels
    spread over all, in activations and in weights. Before a LayerNorm, Q keeps the mean over the channels: it then
    commutes with the norm, which no longer needs to be replaced by an RMSNorm.

    An output head that shares its weight with the embedding gets one of its own, since only it takes up a gain.
    Quantizers of the weights that change are fitted anew; static activations need `calibrate`.

    Args:
        model: prepared, or in full precision.
        batches: mappings that hold labels, to learn from; looked at only for that.
        kind: `hadamard`, with random signs, or `orthogonal`, any rotation alike.
        heads: also rotate the values of each head, by a Hadamard matrix that all share (QuaRot, stage 1c), where the
            layer after attention can take it up.
        seed: of the random signs, or of the rotation.
        steps: of learning the rotation of the stream on the loss of the quantized model, see `learned_rotation`
            (SpinQuant, arXiv 2405.16406).
        rate: the learning rate of the first step; it falls to none.

    Returns:
        `model`.

    Raises:
        InputError: if there is no such kind, nothing to learn from, or the function of this model would change, as
            where norms stand between branches and the stream (Gemma).
    """
    if kind not in _KINDS:
        raise InputError(f"There is no kind of rotation '{kind}'.{nearest(kind, _KINDS)}")
    generator = torch.Generator().manual_seed(seed)
    stream = find_stream(model)
    make = mean_keeping if stream.centers else _KINDS[kind]
    rotate_stream_(model, stream, make(stream.size, generator))
    if heads:
        rotate_heads_(model, stream.folds, generator)
    if steps:
        rotate_stream_(model, stream, learned_rotation(model, stream, batches, steps, rate))
    return model


@torch.no_grad()
def rotate_stream_(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    """Multiply what is written to the residual stream by `rotation` `[size, size]`, and undo it where it is read.

    Raises:
        InputError: if a hidden state would not come out as before.
    """
    _refuse_dead_gains(stream)
    require_proof(model, stream, rotation)
    untie(model)
    for reading in stream.readings:
        _fold_gain(reading, rotation)
    for writer in stream.writers:
        change_outputs_(writer, lambda matrix: rotation.to(matrix).T @ matrix)
    readers = [reader for reading in stream.readings for reader in reading.readers]
    reinitialize_([*readers, *stream.writers])


def _fold_gain(reading: Reading, rotation: Tensor) -> None:
    """Let the readers take up the gain of the norm and the rotation; the bias goes to theirs where all have one."""
    norm, gain, bias = reading.norm, reading.norm.gain, reading.norm.bias
    own = [getattr(reader, "bias", None) if isinstance(reader, nn.Linear) else None for reader in reading.readers]
    if bias is not None and all(each is not None for each in own):
        for reader, each in zip(reading.readers, own, strict=True):
            each.add_((reader.weight.double() @ bias).to(each.dtype))  # type: ignore[union-attr, operator]
        bias = torch.zeros_like(bias)
    for reader in reading.readers:
        change_inputs_(reader, lambda matrix: (matrix * gain) @ rotation.to(matrix))
    if bias is not None:
        bias = torch.where(bias == 0, bias, bias / gain) @ rotation.to(bias)
    norm.fill_(torch.ones_like(gain), bias)


def _refuse_dead_gains(stream: Stream) -> None:
    for reading in stream.readings:
        bias = reading.norm.bias
        if bias is not None and ((reading.norm.gain == 0) & (bias != 0)).any():
            raise InputError("A norm has channels with a bias and a gain of zero, which no rotation can take up.")


def untie(model: Any) -> None:
    """Give the output head a weight, and a quantizer, of its own where it shares those of the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    if isinstance(head, QuantLayer):
        head.weight_quantizer = copy.deepcopy(head.weight_quantizer)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    name = next(name for name, module in model.named_modules() if module is head)
    getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)


@torch.no_grad()
def rotate_heads_(model: nn.Module, folds: Iterable[Fold], generator: torch.Generator) -> None:
    """Rotate the values of every head of attention, and undo it in the layer after; whatever cannot be proven stays."""
    whole = model_probe(model, 2, 6)
    made: dict[int, Tensor] = {}
    for fold in folds:
        block = model.get_submodule(fold.block)
        size = _head_size(fold, block)
        if not isinstance(fold.source, nn.Linear) or size is None:
            continue
        matrix = made.setdefault(size, rotation(size, generator))
        with full_precision(model):
            (probe,) = block_probes(whole, [block])
            rotates = probe is not None and _heads_rotate(probe, fold, matrix)
        if rotates:
            _rotate_values(fold, matrix)


def _rotate_values(fold: Fold, matrix: Tensor) -> None:
    assert isinstance(fold.source, nn.Linear)
    change_outputs_(fold.source, lambda m: _in_chunks(m.mT, matrix, fold.columns).mT)
    for target in fold.targets.values():
        change_inputs_(target, lambda m: _in_chunks(m, matrix))
    reinitialize_([fold.source, *fold.targets.values()])


def _head_size(fold: Fold, block: nn.Module) -> int | None:
    """How many consecutive columns hold one head, if the block says and the columns of the target agree."""
    sizes = {size for m in block.modules() if isinstance(size := getattr(m, "head_dim", None), int)}
    size = next(iter(sizes), 0)
    if len(sizes) != 1 or len(fold.columns) % size:
        return None
    chunks = fold.columns.view(-1, size)
    consecutive = (chunks == chunks[:, :1] + torch.arange(size, device=chunks.device)).all()
    return size if consecutive and len(chunks[:, 0].unique()) * size == len(fold.columns.unique()) else None


def _heads_rotate(probe: Probe, fold: Fold, matrix: Tensor) -> bool:
    source: Any = fold.source
    undo: Change = lambda x: _in_chunks(x.double(), matrix.T).to(x.dtype)  # noqa: E731
    outputs: dict[nn.Module, Change] = {source: lambda y: _in_chunks(y.double(), matrix, fold.columns).to(y.dtype)}
    return proves(probe, outputs, dict.fromkeys(fold.targets.values(), undo))


def _in_chunks(x: Tensor, matrix: Tensor, columns: Tensor | None = None) -> Tensor:
    """Multiply every chunk of the last dimension of `x` by `matrix`; only those channels that `columns` name."""
    matrix, size = matrix.to(x), len(matrix)
    if columns is None:
        return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    heads = columns.view(-1, size).unique(dim=0).to(x.device)
    y = x.clone()
    y[..., heads] = x[..., heads] @ matrix
    return y
