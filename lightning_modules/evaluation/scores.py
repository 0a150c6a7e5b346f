"""Figures of a model on a text."""

import math
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.data.windows import IGNORED
from lightning_modules.evaluation.text import Text, batches, labels_of, windows
from qat.errors import InputError

# Whose exponential a float still holds.
_MOST_NATS = 700


class Scores(NamedTuple):
    """Means over the predicted tokens of a text.

    tokens: how many are predicted.
    perplexity: exp of the mean cross entropy.
    accuracy: share of the tokens that are the likeliest by the model.
    kl: KL(p || p_hat) in nats a token, p being the reference's prediction; None without a reference.
    agreement: share of the tokens where the likeliest one is that of the reference; None without a reference.
    """

    tokens: int
    perplexity: float
    accuracy: float
    kl: float | None
    agreement: float | None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    text: Text,
    window: int,
    stride: int,
    batch_size: int = 4,
    reference: nn.Module | None = None,
    description: str = "evaluating",
) -> Scores:
    """Let `model` predict `text`, and compare with what `reference` predicts.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        window, stride: see `windows`; both models read the same.
        batch_size: windows at a time.
        reference: of the same vocabulary.

    Raises:
        InputError: if nothing is predicted, a prediction is not finite, or the vocabularies differ.
    """
    todo = list(batches(list(windows(len(text.ids), window, stride)), batch_size))
    device = next(model.parameters()).device
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for some in track(todo, description=description, transient=True):
        ids = torch.stack([text.ids[w.start : w.end] for w in some]).to(device)
        labels = torch.stack([labels_of(text, w) for w in some]).to(device)
        found = _logits(model, ids)
        expected = None if reference is None else _logits(reference, ids)
        if expected is not None and expected.shape != found.shape:
            raise InputError(
                f"The model predicts {found.shape[-1]} tokens and its reference {expected.shape[-1]}: choose the model "
                "that it was made from by model=hf model.name=..., or set reference=false."
            )
        # A window at a time: in float32 the logits of a batch take several times the memory of a model.
        for row in range(len(ids)):
            sums += _sums(found[row], labels[row], None if expected is None else expected[row])
    tokens, nll, right, divergence, alike = sums.tolist()
    if not tokens:
        raise InputError("No token of the evaluation text is learned: its chats hold no answer of an assistant.")
    if not math.isfinite(nll):
        raise InputError("The model predicts NaN or infinity on this text.")
    perplexity = math.exp(nll / tokens) if nll / tokens < _MOST_NATS else math.inf
    own = Scores(int(tokens), perplexity, right / tokens, None, None)
    return own if reference is None else own._replace(kl=divergence / tokens, agreement=alike / tokens)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _sums(logits: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """Of one window: predicted tokens, their negative log likelihood, right ones, KL, and where both agree."""
    counted = labels[1:] != IGNORED
    targets = labels[1:][counted]
    log_p = logits[:-1][counted].float().log_softmax(-1)
    best = log_p.argmax(-1)
    found = [len(targets), F.nll_loss(log_p, targets, reduction="sum"), (best == targets).sum(), 0.0, 0.0]
    if reference is not None:
        expected = reference[:-1][counted].float().log_softmax(-1)
        found[3] = F.kl_div(log_p, expected, reduction="sum", log_target=True)
        found[4] = (best == expected.argmax(-1)).sum()
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=logits.device) for value in found])
