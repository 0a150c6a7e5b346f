"""The loss of a language model computed at its output head, so that the logits of all tokens never exist at once."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.data.windows import IGNORED
from lightning_modules.head import Head, Shape
from qat.errors import InputError, nearest
from qat.kernels.cross_entropy import linear_cross_entropy
from qat.kernels.linear import compute_dtype

LOSSES = ("auto", "model", "chunked", "liger", "cce")
_PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}
_MEND = "Set module.loss=model."


class HeadLoss:
    """The mean cross entropy of the next tokens, from the last hidden states and the weight of the output head.

    Before it is used, an experiment proves that it computes what the model does, see `Head`.

    Args:
        model: a prepared causal LM of transformers.
        kind: `chunked`, of this project; `liger` (liger-kernel) or `cce` (cut-cross-entropy), on a GPU.

    Raises:
        InputError: if the model does something else with its logits, or a package or the GPU is missing.
    """

    def __init__(self, model: Any, kind: str) -> None:
        check_loss(kind)
        self.kind, self.head = kind, Head(model, f"module.loss={kind}", _MEND)
        self._sum = _sum_of(kind, self.head.linear, next(model.parameters()).device)

    def pays(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether the batch has more tokens than one chunk: otherwise the model's own loss is the same and as small."""
        return self.kind != "chunked" or batch["input_ids"].numel() > self.head.linear.in_features

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of `batch`, `input_ids` and `labels` `[batch, tokens]`; 0 where no token is learned."""
        x, weight = self.head.inputs({name: value for name, value in batch.items() if name != "labels"})
        targets = next_tokens(batch["labels"])
        with torch.profiler.record_function("loss"):
            total = self._sum(x.reshape(-1, x.shape[-1]), weight, self.head.linear.bias, targets, self.head.shape)
            return total / (targets != IGNORED).sum().clamp(min=1)


def next_tokens(labels: Tensor) -> Tensor:
    """The target of every token, the label of the one that follows, `[batch * tokens]`."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)


def check_loss(kind: str) -> None:
    """Whether there is such a loss, and the package that it comes from; what it asks of a model is asked by `HeadLoss`.

    Raises:
        InputError: if not.
    """
    if kind not in LOSSES:
        raise InputError(f"module.loss is '{kind}'.{nearest(str(kind), LOSSES)}")
    if kind in _PACKAGES and importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise InputError(
            f"module.loss={kind} needs a package: pip install lightning-qat[{kind}], or set it to chunked."
        )


def head_loss(model: nn.Module, kind: str) -> HeadLoss | None:
    """What computes the loss of `model`; None: the model itself. `auto` is `chunked` wherever that is the same.

    Raises:
        InputError: if there is no such loss, or it does not fit the model.
    """
    if kind != "auto":
        return None if kind == "model" else HeadLoss(model, kind)
    try:
        return HeadLoss(model, "chunked")
    except InputError as error:
        rank_zero_info(f"module.loss=auto is module.loss=model here, with the logits of all tokens: {error}")
        return None


Sum = Callable[[Tensor, Tensor, Tensor | None, Tensor, Shape], Tensor]


def _sum_of(kind: str, head: nn.Linear, device: torch.device) -> Sum:
    """The function that sums the cross entropy of all tokens."""
    if kind == "chunked":
        # The logits of a chunk then take as much memory as the gradient of the weight.
        return partial(chunked, head.in_features)
    if device.type != "cuda":
        raise InputError(f"module.loss={kind} runs on a GPU only: set module.loss=chunked.")
    if kind == "cce" and head.bias is not None:
        raise InputError("module.loss=cce takes no bias, and the output head has one: set module.loss=chunked.")
    return {"liger": liger, "cce": cce}[kind]


def chunked(chunk: int, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Shape) -> Tensor:
    """The logits of `chunk` tokens at a time, see `qat.kernels.cross_entropy`; on any device."""
    return linear_cross_entropy(x, weight, bias, targets, chunk, *shape, ignored=IGNORED)


def liger(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Shape) -> Tensor:
    """liger-kernel, "Liger Kernel: Efficient Triton Kernels for LLM Training" (arXiv 2410.10989)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    dtype = compute_dtype(x)
    x, weight, bias = _scaled(x.to(dtype), weight.to(dtype), bias, shape.scale)
    total: Tensor = liger_fused_linear_cross_entropy(
        x,
        weight,
        targets,
        bias,
        ignore_index=IGNORED,
        reduction="sum",
        softcap=shape.softcap,
        accum_dtype=torch.float32,
    )
    return total


def cce(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Shape) -> Tensor:
    """cut-cross-entropy, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009); 16 bits only."""
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    dtype = compute_dtype(x)
    if dtype == torch.float32:
        raise InputError("module.loss=cce computes in 16 bits: set trainer.precision=bf16-mixed.")
    x, weight, _ = _scaled(x.to(dtype), weight.to(dtype), bias, shape.scale)
    total: Tensor = cut_cross_entropy(x, weight, targets, ignore_index=IGNORED, softcap=shape.softcap, reduction="sum")
    return total


def _scaled(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """The product's factors with `scale` in the smaller one, for kernels that know no scale."""
    return (x, weight, bias) if scale == 1 else (x * scale, weight, None if bias is None else bias * scale)
