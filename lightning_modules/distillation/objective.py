"""The objective of distillation: cross entropy and divergence of logits, and what is compared inside of the models."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_modules.data.windows import IGNORED
from lightning_modules.distillation.cache import CACHE_DTYPES, INDICES, LOG_P, top_k_of_batch
from lightning_modules.distillation.chunked import Sums, at_heads, of_logits
from lightning_modules.distillation.divergences import divergence_of
from lightning_modules.distillation.lazy_logits import LazyLogits, chunk_of, head_inputs, lazy_logits, proven_head
from lightning_modules.distillation.logits import LogitLoss
from lightning_modules.distillation.teacher import confidence, make_teacher, share_frozen, vocabulary
from lightning_modules.distillation.watched import outputs_of
from lightning_modules.head import AS_IS, Head
from lightning_modules.loss import next_tokens
from qat.errors import InputError, nearest
from qat.options import require_whole, require_within

Batch = Mapping[str, Tensor]
_CACHED = (INDICES, LOG_P)


class Term(Protocol):
    """Something that is compared inside of both models."""

    weight: float

    def pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The modules whose outputs are compared."""

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
        """The loss, from those outputs."""


class TeacherOutputs(NamedTuple):
    """The teacher's logits of a batch, where logits are compared, and outputs of modules inside of it."""

    logits: LazyLogits | None
    inside: Mapping[nn.Module, Tensor]


@dataclass
class _Fit:
    """What holds for one fit: the student, the heads where they are proven, and what is watched in both.

    Without the student's head whole logits are compared, and the teacher's is not used either.
    """

    student: Any
    logit_loss: LogitLoss
    head: Head | None
    teacher_head: Head | None
    pairs: dict[str, list[tuple[nn.Module, nn.Module]]]


class Distillation:
    """(1 - weight) CE + weight T^2 D(teacher, student) + the weighted terms inside of the models.

    It holds the teacher, and no module holds it: so no checkpoint, optimizer or artifact ever does.

    Args:
        teacher: another model than the student before it was quantized, on the hub or in a folder.
        dtype: of the teacher's weights; None takes the student's.
        divergence: `forward_kl`, `reverse_kl`, `jsd` or `cakld`, see `divergences`.
        weight: of the divergence, from 0 to 1; the rest is that of cross entropy.
        temperature: divides the logits of both, positive.
        top_k: how many of the teacher's likeliest tokens are told apart, see `TopK`; None: all.
        beta: of jsd.
        gamma: of cakld; None measures it with the teacher, see `measure_gamma`.
        cache: a folder for the teacher's `top_k` logits of every training window, which then take its place: see
            `train_from_cache`. None: the teacher reads every batch.
        cache_dtype: of their logarithmic probabilities there.
        hidden, attention: terms inside of the models; weight 0 is off.

    Raises:
        InputError: if an option is out of range, or nothing is distilled.
    """

    def __init__(
        self,
        teacher: str | None = None,
        dtype: str | None = None,
        divergence: str = "forward_kl",
        weight: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        beta: float = 0.5,
        gamma: float | None = None,
        cache: str | None = None,
        cache_dtype: str = "float16",
        hidden: Term | None = None,
        attention: Term | None = None,
    ) -> None:
        require_within("distill.weight", weight, 0.5, 0, 1)
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise InputError(f"distill.temperature is {temperature}; it divides logits: set it to 1, or to 2.")
        if top_k is not None:
            require_whole("distill.top_k", top_k, 100)
        self.name, self.dtype, self.weight, self.temperature, self.top_k = teacher, dtype, weight, temperature, top_k
        self.terms = {name: term for name, term in (("hidden", hidden), ("attention", attention)) if term is not None}
        self.terms = {name: term for name, term in self.terms.items() if term.weight}
        if not weight and not self.terms:
            raise InputError("distill.weight is 0 and no other term is on, so nothing is distilled: set it to 0.5.")
        if cache_dtype not in CACHE_DTYPES:
            raise InputError(f"distill.cache_dtype is '{cache_dtype}'.{nearest(str(cache_dtype), CACHE_DTYPES)}")
        if cache is not None:
            self._check_cached()
        divergence_of(divergence, beta, 0.5 if gamma is None else gamma)  # refused now, not after the model is loaded
        self.divergence, self.beta, self.gamma = divergence, beta, gamma
        self.cache, self.cache_dtype = cache, cache_dtype
        self.teacher: nn.Module | None = None
        self._from_cache = False
        self._fit: _Fit | None = None

    @property
    def needs_gamma(self) -> bool:
        """Whether `measure_gamma` is still to be called."""
        return bool(self.weight) and self.divergence == "cakld" and self.gamma is None

    def make_teacher(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Make the teacher, of `model` as it is now: before anything is pruned, rotated or quantized.

        Raises:
            InputError: if it cannot teach this student, or `top_k` is more than its vocabulary.
        """
        tokens = vocabulary(model)
        if self.top_k is not None and self.top_k > tokens:
            raise InputError(
                f"distill.top_k is {self.top_k}, and the vocabulary has {tokens} tokens: set it to 100, or null."
            )
        self.teacher = make_teacher(model, self.name, self.dtype, tokenizer)

    def measure_gamma(self, batches: Iterable[Batch]) -> float:
        """Find gamma of cakld: how sure the teacher is of the next token of `batches`, which the paper does once.

        Once, and not for each batch: so the gradient of a batch is that of its parts.
        """
        self.gamma = confidence(self._require_teacher(), batches)
        return self.gamma

    def train_from_cache(self) -> None:
        """Take logits from a `TeacherCache` from now on, which come with every batch; the teacher is let go."""
        self.teacher, self._from_cache = None, True

    def start(self, student: nn.Module, at_heads: bool = True, compiled: bool = False) -> None:
        """Get ready to train `student`, as transforms left it, on its device.

        Args:
            at_heads: compute at the heads wherever that is proven to give both models' logits; false takes whole ones.
            compiled: whether its blocks are compiled.

        Raises:
            InputError: if there is no teacher, or a term does not fit the models.
        """
        teacher = None if self._from_cache else self._require_teacher()
        if self.needs_gamma:
            raise InputError(
                "distill.gamma is not known: call measure_gamma(batches) after make_teacher(model), or set it to 0.5."
            )
        if compiled and self.terms:
            raise InputError(
                f"distill.{next(iter(self.terms))} looks into blocks, which compiled ones do not show: set "
                "module.compile=null, or its weight to 0."
            )
        head = proven_head(student) if at_heads and self.weight else None
        teacher_head, pairs = None, {}
        if teacher is not None:
            teacher.to(next(student.parameters()).device)
            share_frozen(teacher, student)
            teacher_head = None if head is None else proven_head(teacher)
            head = None if teacher_head is None else head
            pairs = {name: term.pairs(student, teacher) for name, term in self.terms.items()}
        self._fit = _Fit(student, self._logit_loss(head, teacher_head), head, teacher_head, pairs)

    def stop(self) -> None:
        """Forget the student; the teacher stays."""
        self._fit = None

    @torch.no_grad()
    def teacher_outputs(self, batch: Batch, cached: Mapping[str, Tensor] | None = None) -> TeacherOutputs:
        """What the teacher computes of `batch`.

        Args:
            cached: what a cache has beside it, see `split`.

        Raises:
            InputError: if these are to be learned from, and missing.
        """
        fit = self._require_fit()
        if self._from_cache:
            if not cached:
                raise InputError("A batch has no cached logits of the teacher: set data.beside = cache.window.")
            return TeacherOutputs(top_k_of_batch(cached), {})
        teacher, inputs = self._require_teacher(), _without_labels(batch)
        with outputs_of([theirs for pairs in fit.pairs.values() for _, theirs in pairs]) as inside:
            logits = lazy_logits(teacher, fit.teacher_head, inputs)
        return TeacherOutputs(logits if self.weight else None, inside)

    def loss(
        self, batch: Batch, teacher: TeacherOutputs, cross_entropy: Callable[[Batch], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `batch`, 0 where no token is learned, and its terms without their weights.

        Args:
            batch: `input_ids` and `labels` `[batch, tokens]`.
            teacher: its outputs for the same batch.
            cross_entropy: the student's loss alone, where its logits are not compared.
        """
        fit = self._require_fit()
        with outputs_of([own for pairs in fit.pairs.values() for own, _ in pairs]) as inside:
            if self.weight:
                loss, measured = self._loss_of_logits(fit, batch, teacher)
            else:
                loss = cross_entropy(batch)
                measured = {"cross_entropy": loss.detach()}
        for name, term in self.terms.items():
            found = term([(inside[own], teacher.inside[theirs]) for own, theirs in fit.pairs[name]], batch)
            loss, measured[name] = loss + term.weight * found, found.detach()
        return loss, measured

    def _loss_of_logits(self, fit: _Fit, batch: Batch, teacher: TeacherOutputs) -> tuple[Tensor, dict[str, Tensor]]:
        targets = next_tokens(batch["labels"])
        count = (targets != IGNORED).sum().clamp(min=1)
        if fit.head is None:
            total, sums = self._of_whole_logits(fit, batch, teacher, targets, count)
        else:
            assert teacher.logits is not None
            student = head_inputs(fit.head, _without_labels(batch))
            with torch.profiler.record_function("loss"):
                total, sums = at_heads(student, teacher.logits, targets, chunk_of(fit.student), fit.logit_loss)
        measured = {"cross_entropy": sums.cross_entropy / count, "divergence": sums.divergence / count}
        return total / count, measured

    def _of_whole_logits(
        self, fit: _Fit, batch: Batch, teacher: TeacherOutputs, targets: Tensor, count: Tensor
    ) -> tuple[Tensor, Sums]:
        """The same for heads that are more than a product: the model's own loss and its own logits."""
        assert teacher.logits is not None
        output = fit.student(**batch, use_cache=False)
        z = output.logits.flatten(0, 1)
        total, sums = of_logits(z, teacher.logits, targets, chunk_of(fit.student), fit.logit_loss)
        if self.weight == 1:
            return total, sums
        # The model's mean over no token is NaN.
        own = torch.where((targets != IGNORED).any(), output.loss, 0)
        return self.weight * total + (1 - self.weight) * own * count, sums

    def _logit_loss(self, head: Head | None, teacher_head: Head | None) -> LogitLoss:
        divergence = divergence_of(self.divergence if self.weight else "forward_kl", self.beta, self.gamma)
        if head is None:  # logits are what they will be, and the model's own loss is the cross entropy
            return LogitLoss(divergence, 1.0, self.temperature, self.top_k)
        theirs = AS_IS if teacher_head is None else teacher_head.shape
        return LogitLoss(divergence, self.weight, self.temperature, self.top_k, head.shape, theirs)

    def _check_cached(self) -> None:
        """Refuse what needs more of the teacher than its likeliest tokens."""
        if self.top_k is None:
            raise InputError("distill.cache keeps the teacher's likeliest tokens alone: set distill.top_k=100.")
        if self.terms:
            name = next(iter(self.terms))
            raise InputError(
                f"distill.{name} looks into the teacher, of which distill.cache keeps logits only: set "
                f"distill.{name}.weight=0, or distill.cache=null."
            )

    def _require_teacher(self) -> nn.Module:
        if self.teacher is None:
            raise InputError("There is no teacher: call distillation.make_teacher(model) before the model is prepared.")
        return self.teacher

    def _require_fit(self) -> _Fit:
        if self._fit is None:
            raise InputError("Distillation has no student: call distillation.start(model) after it is prepared.")
        return self._fit


def split(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What of a batch is the model's, and what is the teacher's."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name, value in batch.items():
        parts[name in _CACHED][name] = value
    return parts


def _without_labels(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}
