"""A language model taken apart before its output head, so that the logits of all tokens need never exist at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import InputError
from qat.nn import LowBitLinear, QuantLinear
from qat.quantizers import NoQuantizer
from qat.transforms.layers import output_head

# What configs call a factor of the logits. Some models multiply by it and some divide: the experiment tells.
_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier")


class Shape(NamedTuple):
    """What becomes of the head's outputs z: scale * z, and then softcap * tanh(z / softcap) if there is a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z.float() * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


AS_IS = Shape()


class Head:
    """The output head of a causal LM as a linear layer and a `shape`, proven by an experiment to give its logits.

    Args:
        model: a causal LM of transformers, prepared or plain.
        option: what asks for it, for messages: `module.loss=chunked`.
        mend: what messages say to do instead.

    Attributes:
        linear: the layer.
        shape: what becomes of its outputs.

    Raises:
        InputError: if the model does something else with its logits, or adds to its loss.
    """

    def __init__(self, model: Any, option: str, mend: str) -> None:
        self._model = model
        self._base: nn.Module = getattr(model, getattr(model, "base_model_prefix", ""), model)
        head = output_head(model)
        if not isinstance(head, nn.Linear) or self._base is model:
            raise InputError(f"{option} needs an output head that is a linear layer after the model. {mend}")
        if isinstance(head, QuantLinear) and not _are_none(head.output_quantizer, head.grad_quantizer):
            raise InputError(f"{option} does not see the logits that the scheme quantizes, or their gradient. {mend}")
        if isinstance(head, LowBitLinear):
            raise InputError(f"{option} does not multiply codes, as the scheme says for the head. {mend}")
        self.linear = head
        shape = self._proven_shape()
        if shape is None:
            raise InputError(
                f"{option} does not compute the loss of {type(model).__name__}, which changes its logits or adds to "
                f"its loss. {mend}"
            )
        self.shape: Shape = shape

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the head multiplies: hidden states `[batch, tokens, in]` and the weight `[vocabulary, in]`.

        Args:
            batch: what the model takes, without `labels`.
        """
        hidden = self._base(**batch, use_cache=False).last_hidden_state
        if not isinstance(self.linear, QuantLinear):
            return hidden, self.linear.weight
        return self.linear.input_quantizer(hidden), self.linear.weight_quantizer(self.linear.weight)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def _proven_shape(self) -> Shape | None:
        """How the head's outputs become logits, found by trying what the config has words for; None if by no such way.

        The model's own loss must follow from them, too.
        """
        ids = torch.arange(8, device=self.linear.weight.device)[None] % self.linear.out_features
        with _evaluating(self._model):
            expected = self._model(input_ids=ids, labels=ids, use_cache=False)
            x, weight = self.inputs({"input_ids": ids})
            z = F.linear(x, weight, self.linear.bias)
        shape = min(_shapes(self._model.config), key=lambda shape: float((shape(z) - expected.logits).abs().max()))
        if getattr(expected, "aux_loss", None) is not None or not _is_their_loss(expected, ids):
            return None
        tolerance = 1e-4 if z.dtype == torch.float32 else 2e-2
        return shape if torch.allclose(shape(z), expected.logits.float(), tolerance, tolerance) else None


def _is_their_loss(output: Any, ids: Tensor) -> bool:
    """Whether the loss of a model is the cross entropy of its logits and nothing else, whatever they are rounded to."""
    loss = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    tolerance = 1e-4 if output.loss.dtype == torch.float32 else 1e-2
    return torch.allclose(loss, output.loss.float(), tolerance, tolerance)


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
