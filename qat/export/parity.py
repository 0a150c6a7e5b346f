"""The grid contract, checked on a whole model: what is shipped computes what was trained."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.nn import PackedLayer
from qat.numerics.qtensor import QParams, QuantizedTensor

# Of the likeliest tokens, where the arithmetic is the same and only sums may run in another order.
LEAST_TOP1 = 0.999


class GridContractError(RuntimeError):
    """An exported model does not compute what the trained one does."""


class Parity(NamedTuple):
    """How the logits of a model differ from those of the trained one, on the same tokens.

    max_abs_delta_logit: the largest difference of a logit.
    kl: KL(trained || model) in nats a token, the mean.
    top1_agreement: share of the tokens where both find the same next token likeliest.
    perplexity: of the model.
    """

    max_abs_delta_logit: float
    kl: float
    top1_agreement: float
    perplexity: float


@torch.no_grad()
def parity(trained: Tensor, exported: Tensor, ids: Tensor) -> Parity:
    """Compare logits `[batch, tokens, vocabulary]` that two models found for `ids` `[batch, tokens]`.

    Raises:
        GridContractError: if the shapes differ, or a logit is not finite.
    """
    if trained.shape != exported.shape:
        raise GridContractError(
            f"The exported model has logits {list(exported.shape)}, the trained {list(trained.shape)}."
        )
    largest, kl, same, nll = 0.0, 0.0, 0, 0.0
    # A window at a time: in float32 the logits of a batch take several times the memory of a model.
    for p, q, tokens in zip(trained, exported, ids.to(trained.device), strict=True):
        p, q = p.float(), q.to(trained.device).float()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        largest = max(largest, float((p - q).abs().max()))
        kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        nll += float(F.nll_loss(log_q[:-1], tokens[1:], reduction="sum"))
    if not math.isfinite(largest):
        raise GridContractError("The exported model computes logits that are not finite.")
    count = ids.numel()
    # Logits that are the same to the bit may have a divergence of some rounding errors, and less than none.
    return Parity(largest, max(kl / count, 0.0), same / count, math.exp(nll / (count - len(ids))))


def check_logits(trained: Tensor, exported: Tensor, exact: bool, tolerance: float = 1e-2) -> float:
    """Compare the logits of a trained model with those of its export, on the same tokens.

    Args:
        trained, exported: `[batch, tokens, vocabulary]`.
        exact: demand the same bits.
        tolerance: else allow this relative error, for kernels that sum in another order.

    Returns:
        max |difference| / max |logit|.

    Raises:
        GridContractError: if they differ by more.
    """
    error = float((trained.float() - exported.float()).abs().max() / trained.float().abs().max())
    same = torch.equal(trained, exported) if exact else error <= tolerance
    if not same:
        raise GridContractError(
            f"The exported model is not the trained one: relative logit error {error:.1e}, "
            f"{'bit equality' if exact else f'at most {tolerance:.0e}'} required."
        )
    return error


def check_consumer(found: Parity, consumer: str, same_arithmetic: bool, most_kl: float) -> None:
    """Hold what `consumer` computed to what it may differ by.

    Args:
        found: of its logits beside the trained model's.
        consumer: what loaded the export.
        same_arithmetic: it multiplies the same values, and only its sums may run in another order: then the likeliest
            token must be the same nearly always.
        most_kl: in nats a token, what it may diverge otherwise.

    Raises:
        GridContractError: if it differs by more.
    """
    if same_arithmetic and found.top1_agreement < LEAST_TOP1:
        raise GridContractError(
            f"{consumer} finds another likeliest token than the trained model for {1 - found.top1_agreement:.2%} of "
            f"the tokens, at most {1 - LEAST_TOP1:.2%} allowed."
        )
    if found.kl > most_kl:
        raise GridContractError(
            f"{consumer} diverges from the trained model by {found.kl:.2e} nats a token, at most {most_kl:.0e} allowed."
        )


def check_stored(trained: nn.Module, exported: nn.Module) -> None:
    """Demand that both converted models hold the same numbers, layer by layer.

    Raises:
        GridContractError: naming the first layer that differs, and what of it does.
    """
    theirs = dict(exported.named_modules())
    for name, layer in trained.named_modules():
        if isinstance(layer, PackedLayer):
            other = theirs.get(name)
            if not isinstance(other, PackedLayer):
                raise GridContractError(f"{name} is quantized in the trained model, and not in the exported one.")
            for weight, packed in layer.weights().items():
                _check_same(f"{name}.{weight}", packed.quantized(), other.weights()[weight].quantized())
    quantized = tuple(f"{name}." for name, layer in trained.named_modules() if isinstance(layer, PackedLayer))
    _check_others(trained.state_dict(), exported.state_dict(), quantized)


def _check_others(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], quantized: tuple[str, ...]) -> None:
    """What is not quantized."""
    for name, tensor in ours.items():
        if name.startswith(quantized):
            continue
        if name not in theirs or not torch.equal(tensor, theirs[name].to(tensor.device)):
            raise GridContractError(f"{name}, in full precision, is not what was trained.")


def _check_same(name: str, ours: QuantizedTensor, theirs: QuantizedTensor) -> None:
    if not torch.equal(ours.codes, theirs.codes.to(ours.codes.device)):
        raise GridContractError(f"The codes of {name} are not those that were trained.")
    renamed = ours.format != theirs.format  # GGUF has no table of -1, 0 and 1, but three levels
    if renamed and not torch.equal(ours.dequantize(), theirs.dequantize().to(ours.codes.device)):
        raise GridContractError(f"The codes of {name} do not stand for what they were trained as.")
    for field, mine, other in zip(QParams._fields, ours.qparams.for_view(), theirs.qparams.for_view(), strict=True):
        if field == "codebook" and renamed:
            continue
        if not (mine is other if mine is None or other is None else torch.equal(mine, other.to(mine.device))):
            raise GridContractError(f"The {field} of {name} is not what was trained.")
