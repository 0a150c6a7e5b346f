"""What a run needs of a cache of its teacher's logits: which one it is, and which windows."""

from collections.abc import Sequence

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import IterableDataset

from lightning_modules import fingerprint
from lightning_modules.data import CausalLMDataModule
from lightning_modules.distillation.cache import Sizes, TeacherCache
from lightning_modules.distillation.objective import Distillation
from lightning_modules.distillation.teacher import vocabulary
from qat.errors import InputError
from qat.nn.packed import dtype_name


def cache_for(distillation: Distillation, model: nn.Module, data: CausalLMDataModule, precision: str) -> TeacherCache:
    """The cache that `distillation` names, for a teacher of `model` as it is now and the training windows of `data`.

    No teacher is made or loaded for it.

    Args:
        precision: in which the teacher computes, `bf16-mixed` for instance.

    Raises:
        InputError: if the folder was computed for something else, or the windows have no numbers.
    """
    data.setup()
    if isinstance(data.train_windows, IterableDataset):
        raise InputError(
            "distill.cache finds a window by its number, which those of a stream have not: set data.streaming=false, "
            "or distill.cache=null."
        )
    assert data.train_windows is not None
    assert distillation.cache is not None
    assert distillation.top_k is not None
    windows, name = data.train_windows, distillation.name
    source = {
        "teacher": fingerprint.of_model(model) if name is None else fingerprint.of_named_model(name),
        "teacher_dtype": distillation.dtype or dtype_name(next(model.parameters()).dtype),
        "precision": precision,
        "temperature": float(distillation.temperature),
        "text": fingerprint.of_windows(windows),
    }
    sizes = Sizes(len(windows), data.sequence_length, distillation.top_k, vocabulary(model))  # type: ignore[arg-type]
    return TeacherCache(distillation.cache, sizes, distillation.cache_dtype, source)


def windows_needed(data: CausalLMDataModule, trainer: pl.Trainer, calibration_batches: int) -> Sequence[int]:
    """The numbers of the windows that a fit of `trainer` sees: all, or the first ones of less than an epoch.

    Args:
        calibration_batches: how many batches must be among them, which are the first ones of the same order.
    """
    data.setup()
    assert data.train_windows is not None
    count = len(data.train_windows)  # type: ignore[arg-type]
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    in_order = trainer.limit_train_batches == 1.0 and not trainer.overfit_batches
    if trainer.max_steps < 0 or not in_order or batches > count // trainer.world_size // data.batch_size:
        return range(count)
    return data.order()[: max(batches * trainer.world_size, calibration_batches) * data.batch_size]
