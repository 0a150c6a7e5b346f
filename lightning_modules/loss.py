"""The loss of a language model computed at its output head, so that the logits of all tokens never exist at once."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.data.windows import IGNORED
from qat.errors import InputError, nearest
from qat.kernels.cross_entropy import linear_cross_entropy
from qat.kernels.linear import compute_dtype
from qat.nn import LowBitLinear, QuantLinear
from qat.quantizers import NoQuantizer
from qat.transforms.layers import output_head

LOSSES = ("auto", "model", "chunked", "liger", "cce")
_PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}
_MEND = "Set module.loss=model."
# What configs call a factor of the logits. Some models multiply by it and some divide: the experiment tells.
_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")


class Shape(NamedTuple):
    """What becomes of the head's outputs z: scale * z, and then softcap * tanh(z / softcap) if there is a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z.float() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class HeadLoss:
    """The mean cross entropy of the next tokens, from the last hidden states and the weight of the output head.

    Before it is used, an experiment proves that it computes what the model does.

    Args:
        model: a prepared causal LM of transformers.
        kind: `chunked`, of this project; `liger` (liger-kernel) or `cce` (cut-cross-entropy), on a GPU.

    Raises:
        InputError: if the model does something else with its logits, or a package or the GPU is missing.
    """

    def __init__(self, model: Any, kind: str) -> None:
        self.kind, self._model = kind, model
        self._base: nn.Module = getattr(model, getattr(model, "base_model_prefix", ""), model)
        head = output_head(model)
        if not isinstance(head, nn.Linear) or self._base is model:
            raise InputError(f"module.loss={kind} needs an output head that is a linear layer after the model. {_MEND}")
        if isinstance(head, QuantLinear) and not _are_none(head.output_quantizer, head.grad_quantizer):
            raise InputError(
                f"module.loss={kind} does not see the logits that the scheme quantizes, or their gradient. {_MEND}"
            )
        if isinstance(head, LowBitLinear):
            raise InputError(f"module.loss={kind} does not multiply codes, as the scheme says for the head. {_MEND}")
        self._head = head
        self._sum = _sum_of(kind, head, next(model.parameters()).device)
        self._shape = self._proven_shape()

    def pays(self, batch: dict[str, Tensor]) -> bool:
        """Whether the batch has more tokens than one chunk: otherwise the model's own loss is the same and as small."""
        return self.kind != "chunked" or batch["input_ids"].numel() > self._head.in_features

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of `batch`, `input_ids` and `labels` `[batch, tokens]`; 0 where no token is learned."""
        x, weight = self._inputs({name: value for name, value in batch.items() if name != "labels"})
        targets = F.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:].reshape(-1)
        with torch.profiler.record_function("loss"):
            total = self._sum(x.reshape(-1, x.shape[-1]), weight, self._head.bias, targets, self._shape)
            return total / (targets != IGNORED).sum().clamp(min=1)

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the head multiplies: hidden states `[batch, tokens, in]` and the weight `[vocabulary, in]`."""
        hidden = self._base(**batch, use_cache=False).last_hidden_state
        if not isinstance(self._head, QuantLinear):
            return hidden, self._head.weight
        return self._head.input_quantizer(hidden), self._head.weight_quantizer(self._head.weight)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def _proven_shape(self) -> Shape:
        """How the head's outputs become logits, found by trying what the config has words for."""
        ids = torch.arange(8, device=self._head.weight.device)[None] % self._head.out_features
        with _evaluating(self._model):
            expected = self._model(input_ids=ids, labels=ids, use_cache=False)
            x, weight = self._inputs({"input_ids": ids})
            z = F.linear(x, weight, self._head.bias)
        shape = min(_shapes(self._model.config), key=lambda shape: float((shape(z) - expected.logits).abs().max()))
        loss = F.cross_entropy(shape(z)[0, :-1], ids[0, 1:])
        tolerance = 1e-4 if z.dtype == torch.float32 else 2e-2
        pairs = ((shape(z), expected.logits), (loss, expected.loss))
        if all(torch.allclose(own, models.float(), tolerance, tolerance) for own, models in pairs):
            return shape
        raise InputError(
            f"module.loss={self.kind} does not compute the loss of {type(self._model).__name__}, which changes its "
            f"logits or adds to its loss. {_MEND}"
        )


def head_loss(model: nn.Module, kind: str) -> HeadLoss | None:
    """What computes the loss of `model`; None: the model itself. `auto` is `chunked` wherever that is the same.

    Raises:
        InputError: if there is no such loss, or it does not fit the model.
    """
    if kind not in LOSSES:
        raise InputError(f"module.loss is '{kind}'.{nearest(str(kind), LOSSES)}")
    if kind != "auto":
        return None if kind == "model" else HeadLoss(model, kind)
    try:
        return HeadLoss(model, "chunked")
    except InputError:
        return None


Sum = Callable[[Tensor, Tensor, Tensor | None, Tensor, Shape], Tensor]


def _sum_of(kind: str, head: nn.Linear, device: torch.device) -> Sum:
    """The function that sums the cross entropy of all tokens."""
    if kind == "chunked":
        # The logits of a chunk then take as much memory as the gradient of the weight.
        return partial(chunked, head.in_features)
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise InputError(
            f"module.loss={kind} needs a package: pip install lightning-qat[{kind}], or set it to chunked."
        )
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


def _shapes(config: Any) -> Iterator[Shape]:
    """What logits may become, by the words of the config."""
    softcap = getattr(config, "final_logit_softcapping", None)
    factors = [float(value) for name in _FACTORS if (value := getattr(config, name, None))]
    for cap in dict.fromkeys((None, softcap)):
        for scale in (1.0, *factors, *(1 / factor for factor in factors)):
            yield Shape(scale, cap)


def _are_none(*quantizers: nn.Module) -> bool:
    return all(isinstance(quantizer, NoQuantizer) for quantizer in quantizers)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`model` without dropout for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
