"""Computing the teacher's logits for training windows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.data import CausalLMDataModule
from lightning_modules.distillation.cache import TeacherCache
from lightning_modules.distillation.lazy_logits import chunk_of, lazy_logits, proven_head
from lightning_modules.distillation.objective import Distillation
from lightning_modules.distillation.top_k import TopK, top_k_of
from lightning_modules.head import AS_IS, Head
from qat.kernels.linear_loss import chunks
from qat.kernels.logits.reference import shaped


def fill(
    cache: TeacherCache,
    distillation: Distillation,
    data: CausalLMDataModule,
    wanted: Sequence[int],
    console: Console | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Compute what `cache` lacks of the windows `wanted`; of several processes each takes its share.

    The batches follow from `wanted` alone, so one that was interrupted is computed again with the same bits.

    Args:
        distillation: its teacher was made.
        wanted: numbers of the training windows of `data`.
        console: shows how many batches are done, and the time that remains.
        precision: makes the context in which a model of the run computes: that of autocast, for instance.

    Raises:
        InputError: if they do not fit on the disk.
    """
    teacher, windows = distillation.teacher, data.train_windows
    assert teacher is not None, "make_teacher(model) makes it"
    assert windows is not None
    cache.make_room(wanted)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = [wanted[part] for part in chunks(len(wanted), data.batch_size)]
    todo = [some for some in batches[rank::processes] if cache.lacks(some)]
    head, device = proven_head(teacher), next(teacher.parameters()).device
    for some in track(todo, "the teacher reads, once", console=console, transient=True):
        ids = torch.stack([windows[index]["input_ids"] for index in some]).to(device)
        with precision():
            top_k, next_log_p = top_k_logits(teacher, head, ids, cache.sizes.top_k, distillation.temperature)
        cache.write(some, top_k, next_log_p)


@torch.no_grad()
def top_k_logits(teacher: Any, head: Head | None, ids: Tensor, k: int, temperature: float) -> tuple[TopK, Tensor]:
    """What `teacher` predicts after each token.

    Args:
        head: its output head, where that is proven to make its logits: they never exist whole then.
        ids: `[batch, tokens]`.

    Returns:
        its top k at `temperature`, and the logarithmic probability of the next token at 1 `[batch * tokens]`, which
        means nothing for the last one of a window.
    """
    logits = lazy_logits(teacher, head, {"input_ids": ids})
    shape, targets = AS_IS if head is None else head.shape, F.pad(ids, (0, 1))[:, 1:].reshape(-1, 1)
    top_k, next_log_p = [], []
    for rows in chunks(len(targets), chunk_of(teacher)):
        v = shaped(logits.rows(rows), *shape)[0].float()
        top_k.append(top_k_of(v / temperature, k))
        next_log_p.append(F.log_softmax(v, -1).gather(-1, targets[rows])[:, 0])
    indices, log_p = (torch.cat(parts) for parts in zip(*top_k, strict=True))
    return TopK(indices, log_p), torch.cat(next_log_p)
