"""What it costs the model to have one layer quantized in one way, by any of several signals."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import InputError, nearest
from qat.planning.candidates import Candidates, PlannedLayer, Table
from qat.planning.divergence import kl
from qat.planning.entropy import entropy
from qat.planning.fisher import Cost, fisher, gradient
from qat.planning.hutchinson import hutchinson
from qat.planning.kfac import kfac
from qat.planning.output import output
from qat.planning.predictions import Batch, calibration
from qat.planning.rounding import check_rounding, errors, make_rounding
from qat.planning.rows import Rows, tracked
from qat.transforms.finished import fingerprint
from qat.transforms.plain import full_precision

Gather = Callable[[nn.Module, Sequence[PlannedLayer], Sequence[Batch]], Cost]
_BY_ERRORS: dict[str, Gather] = {
    "kfac": kfac,
    "fisher": fisher,
    "gradient": gradient,
    "hutchinson": hutchinson,
    "output": output,
}
SIGNALS = ("kl", *_BY_ERRORS, "entropy")


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, PlannedLayer],
    candidates: Candidates,
    signal: str = "kl",
    folder: str | Path | None = None,
    rounding: str = "nearest",
) -> Table:
    """The cost of every layer as every candidate, `[layer][candidate]`; in full precision it is zero.

    `kl`, `kfac`, `fisher`, `gradient` and `hutchinson` are predicted increases of the loss in nats a token. `output`
    and `entropy` say what happens in a layer, not to the loss. See the module of each for its equation and source.

    Args:
        model: in full precision; takes a batch's `input_ids` and more as keywords, returns an object with `logits`.
        batches: mappings; `labels` of -100 mark tokens that do not count.
        layers: what `planned_layers` found.
        candidates: by name.
        signal: one of `SIGNALS`.
        folder: where rows are kept, so that a run that was killed goes on; rows of another model, other data or
            candidates are not taken up.
        rounding: `nearest` or `gptq`: how the weights will be rounded, whose errors are what costs.

    Raises:
        InputError: if there is no such signal or rounding, they do not go together, there are fewer tokens than a layer
            has inputs, a layer makes NaN of them, or a quantizer does not suit a layer.
    """
    if signal not in SIGNALS:
        raise InputError(f"There is no signal '{signal}'.{nearest(signal, SIGNALS)}")
    check_rounding(rounding)
    if signal == "entropy" and rounding != "nearest":
        raise InputError("signal=entropy has no data for GPTQ to look at: set rounding=nearest, or take signal=kfac.")
    quantizing = {name: candidate for name, candidate in candidates.items() if candidate.quantizes}
    data = calibration(model, batches, layers) if signal != "entropy" else []
    rows = _rows(folder, signal, rounding, model, data, quantizing)
    with full_precision(model):
        table = _measured(model, list(layers.values()), quantizing, data, signal, rounding, rows)
    full = dict.fromkeys(candidates.keys() - quantizing.keys(), 0.0)
    return {layer: costs | full for layer, costs in table.items()}


def _measured(
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    candidates: Candidates,
    data: Sequence[Batch],
    signal: str,
    rounding: str,
    rows: Rows,
) -> Table:
    if signal == "kl":
        return kl(model, layers, candidates, data, rows, rounding)
    if signal == "entropy":
        return {layer.name: entropy(layer, candidates) for layer in tracked(layers, "entropy")}
    return _by_errors(_BY_ERRORS[signal], model, layers, candidates, data, rounding, rows)


def _by_errors(
    gather: Gather,
    model: nn.Module,
    layers: Sequence[PlannedLayer],
    candidates: Candidates,
    data: Sequence[Batch],
    rounding: str,
    rows: Rows,
) -> Table:
    """Costs that follow from statistics of the data, gathered once, and the errors of the weights."""
    missing = [layer for layer in layers if any((layer.name, name) not in rows for name in candidates)]
    if missing:
        cost, rounded = gather(model, missing, data), make_rounding(rounding, model, missing, data)
        with torch.no_grad():
            for layer in tracked(missing, "rounding"):
                for name in (name for name in candidates if (layer.name, name) not in rows):
                    rows.add((layer.name, name), cost(layer, errors(layer, candidates[name], rounded)))
    return {layer.name: {name: rows[layer.name, name] for name in candidates} for layer in layers}


def _rows(
    folder: str | Path | None,
    signal: str,
    rounding: str,
    model: nn.Module,
    data: Sequence[Batch],
    candidates: Candidates,
) -> Rows:
    if folder is None:
        return Rows(None)
    what = fingerprint(model, (batch[key] for batch in data for key in sorted(batch)))
    grids = repr({name: candidate.factory for name, candidate in candidates.items()})
    name = signal if rounding == "nearest" else f"{signal}-{rounding}"
    return Rows(Path(folder) / f"{name}-{hashlib.sha256(f'{what} {grids}'.encode()).hexdigest()[:16]}.jsonl")
