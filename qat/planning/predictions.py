"""What a model predicts on the calibration data, checked as it comes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.planning.candidates import PlannedLayer
from qat.transforms.broken import MADE_NAN, broken_module

IGNORED = -100  # the label that cross entropy skips
Batch = Mapping[str, Tensor]


def calibration(model: nn.Module, batches: Iterable[Any], layers: Mapping[str, PlannedLayer]) -> list[Batch]:
    """The batches on the model's device, refused where they are too few to say anything about `layers`.

    With fewer tokens than a layer has inputs, there are directions of its input that no token has.

    Raises:
        InputError: if there are fewer learned tokens than the widest layer has inputs.
    """
    device = next(model.parameters()).device
    found: list[Batch] = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    tokens = sum(learned_tokens(batch) for batch in found)
    widths = {m.shape[1]: layer.name for layer in layers.values() for m in layer.matrices().values()}
    widest = max(widths)
    if tokens < widest:
        raise InputError(
            f"Too little data: {tokens} tokens to learn from, and {widths[widest]} has {widest} inputs. Give at least "
            "as many tokens: raise calibration_batches, data.batch_size or data.sequence_length."
        )
    return found


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[n, vocabulary]` in float32, and labels `[n]`, of the n tokens of `batch` that are learned.

    Raises:
        InputError: if a logit is NaN or infinite; the first layer that made one is named.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    learned = _learned(batch)
    kept = logits[:, :-1][learned].to(torch.float32)
    if not torch.isfinite(kept).all():
        where = broken_module(model, lambda: model(**inputs, use_cache=False)) or "The model"
        raise InputError(MADE_NAN.format(where=where))
    return kept, _labels(batch)[:, 1:][learned]


def summed_loss(model: nn.Module, batch: Batch, draw: torch.Generator | None = None) -> tuple[Tensor, int]:
    """Cross entropy summed over the learned tokens of `batch`, and their number.

    Args:
        draw: draws labels from what the model predicts, in place of those of the data.

    Raises:
        InputError: see `predictions`.
    """
    logits, labels = predictions(model, batch)
    if draw is not None:
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
    return F.cross_entropy(logits, labels, reduction="sum"), len(labels)


def learned_tokens(batch: Batch) -> int:
    """The number of tokens of `batch` that are predicted and count."""
    return int(_learned(batch).sum())


def _labels(batch: Batch) -> Tensor:
    return batch.get("labels", batch["input_ids"])


def _learned(batch: Batch) -> Tensor:
    """Which tokens but the first are predicted and count, `[batch, tokens - 1]`."""
    learned = _labels(batch)[:, 1:] != IGNORED
    if "labels" not in batch and "attention_mask" in batch:
        learned &= batch["attention_mask"][:, 1:].bool()
    return learned
