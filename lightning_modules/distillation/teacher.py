"""The teacher: a frozen full-precision model, a copy of the student from before it is quantized, or another one."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.data.windows import IGNORED
from lightning_modules.loss import next_tokens
from lightning_modules.models import DTYPES, load_hf
from qat.errors import InputError, nearest
from qat.nn.packed import dtype_name
from qat.transforms import is_quantized
from qat.transforms.layers import output_head


def make_teacher(model: nn.Module, name: str | None, dtype: str | None, tokenizer: Any = None) -> nn.Module:
    """A frozen model in evaluation mode, which shares nothing with `model` that training or a transform may change.

    Args:
        model: the student, before anything is done to it.
        name: another model, on the hub or in a folder; None copies `model`.
        dtype: of its weights, `bfloat16` for instance; None takes that of `model`.
        tokenizer: of the student, which another teacher must share.

    Raises:
        InputError: if the student is quantized already, there is no such model or dtype, or its vocabulary is another.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"distill.dtype is '{dtype}'.{nearest(str(dtype), DTYPES)}")
    if name is None:
        if is_quantized(model):
            raise InputError(
                "The teacher is copied from a model in full precision, and this one is quantized already: name another "
                "by distill.teacher=NAME."
            )
        teacher = copy.deepcopy(model)
    else:
        teacher = _loaded(name, dtype or dtype_name(next(model.parameters()).dtype), tokenizer)
        _check_vocabulary(name, model, teacher)
        teacher.to(next(model.parameters()).device)
    teacher.requires_grad_(False)
    if dtype is not None:
        _cast(teacher, getattr(torch, dtype))
    return teacher.eval()


def share_frozen(teacher: nn.Module, student: nn.Module) -> int:
    """Let `teacher` use the Parameters of `student` that are frozen and hold the same bits: frozen embeddings, say.

    Call it once nothing is done to the student any more but training.

    Returns:
        how many bytes are not held twice any more.
    """
    frozen = {name: p for name, p in student.named_parameters(remove_duplicate=False) if not p.requires_grad}
    saved: dict[int, int] = {}
    for name, own in list(teacher.named_parameters(remove_duplicate=False)):
        theirs = frozen.get(name)
        if theirs is None or own is theirs or not _equal(own, theirs):
            continue
        parent, _, child = name.rpartition(".")
        teacher.get_submodule(parent)._parameters[child] = theirs
        saved[id(theirs)] = own.numel() * own.element_size()
    return sum(saved.values())


@torch.no_grad()
def confidence(teacher: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The mean probability that `teacher` gives to the next token, over all that are learned: BitDistiller's gamma.

    The code that its authors published (arXiv 2402.10631) takes the probability of the likeliest token instead, which
    is at least as large.

    Raises:
        InputError: if no token of `batches` is learned.
    """
    total, count = 0.0, 0
    for batch in batches:
        # A row of the batch at a time, so that the logits are those of few tokens.
        for row in range(len(batch["input_ids"])):
            own = {key: value[row : row + 1] for key, value in batch.items()}
            targets = next_tokens(own.pop("labels"))
            learned = targets != IGNORED
            logits = teacher(**own, use_cache=False).logits[0, learned].float()
            total += float(logits.softmax(-1).gather(-1, targets[learned][:, None]).sum(dtype=torch.float64))
            count += int(learned.sum())
    if not count:
        raise InputError(
            "distill.gamma cannot be measured: no token of the calibration batches is learned. Set it, to 0.5."
        )
    return total / count


def _loaded(name: str, dtype: str, tokenizer: Any) -> nn.Module:
    try:
        loaded = load_hf(name, dtype)
    except InputError as error:
        raise InputError(f"distill.teacher='{name}' is no teacher. {error}") from error
    if tokenizer is not None and loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"distill.teacher='{name}' has other tokens than the student, so their probabilities cannot be compared: "
            "take a teacher of the same family, or distill.teacher=null, the model itself."
        )
    return loaded.model


def _check_vocabulary(name: str, model: nn.Module, teacher: nn.Module) -> None:
    own, theirs = vocabulary(model), vocabulary(teacher)
    if own != theirs:
        raise InputError(
            f"distill.teacher='{name}' has {theirs} tokens in its vocabulary and the student {own}, so their logits "
            "cannot be compared: take a teacher of the same vocabulary, or distill.teacher=null, the model itself."
        )


def vocabulary(model: Any) -> int:
    """How many logits a token has."""
    head = output_head(model)
    return int(model.config.vocab_size if head is None else head.weight.shape[0])


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast Parameters, not computed buffers such as rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a, b)
