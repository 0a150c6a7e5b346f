"""Logits that are computed some tokens at a time: by the output head, of whole logits, or the top k of a cache."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.distillation.top_k import TopK
from lightning_modules.head import Head
from qat.errors import InputError
from qat.kernels.linear import compute_dtype

# Several tensors of a chunk's logits exist at once: together they take about as much as the gradient of the head.
_CHUNKS_OF_A_HEAD = 4
# Or 128 MiB each in float32, where that is more: a small model waits for the launches of many small chunks.
_LOGITS = 2**25


class LazyLogits(Protocol):
    """Logits of a teacher."""

    def rows(self, rows: slice) -> Tensor | TopK:
        """Of some of them: what its head puts out `[rows, vocabulary]`, which may be overwritten, or its top k."""


class Logits(NamedTuple):
    """Logits `[tokens, vocabulary]` of a model."""

    z: Tensor

    def rows(self, rows: slice) -> Tensor:
        """A copy of some of them."""
        return self.z[rows].clone()


class Linear(NamedTuple):
    """Inputs `[tokens, in]`, weight `[vocabulary, in]` and bias `[vocabulary]` of an output head."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def cast(self) -> "Linear":
        """In the dtype of matrix products."""
        dtype = compute_dtype(self.x)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Linear(self.x.to(dtype), self.weight.to(dtype), bias)

    def rows(self, rows: slice) -> Tensor:
        """The head's outputs for some tokens."""
        return F.linear(self.x[rows], self.weight, self.bias)


def lazy_logits(model: Any, head: Head | None, inputs: Mapping[str, Tensor]) -> Linear | Logits:
    """What its head multiplies for all tokens of `inputs`, one after the other, or its logits where none is proven."""
    if head is None:
        return Logits(model(**inputs, use_cache=False).logits.flatten(0, 1))
    return head_inputs(head, inputs).cast()


def head_inputs(head: Head, inputs: Mapping[str, Tensor]) -> Linear:
    """What `head` multiplies, all tokens of the batch one after the other."""
    x, weight = head.inputs(inputs)
    return Linear(x.flatten(0, 1), weight, head.linear.bias)


def proven_head(model: nn.Module) -> Head | None:
    """The head of `model`, where it is proven to make its logits."""
    try:
        return Head(model, "distill", "")
    except InputError:
        return None


def chunk_of(model: Any) -> int:
    """How many tokens have their logits at a time."""
    return chunk_for(int(model.config.hidden_size), int(model.config.vocab_size))


def chunk_for(hidden: int, vocabulary: int) -> int:
    """The same, for a head of that size."""
    return max(1, hidden // _CHUNKS_OF_A_HEAD, _LOGITS // vocabulary)
