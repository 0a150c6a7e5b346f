"""Tasks of lm-eval, by its own library (EleutherAI, "A framework for few-shot language model evaluation")."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_modules.models import LoadedModel
from qat.errors import InputError, nearest


def check_tasks(names: Sequence[str], folder: str | None) -> None:
    """Refuse tasks that cannot run, before a model is loaded.

    Raises:
        InputError: if the library or the folder is missing.
    """
    if names and importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks needs a package: pip install 'lightning-qat[eval]', or leave it out.")
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"task_folder is '{folder}', and there is no such folder.")


def task_scores(
    loaded: LoadedModel, names: Sequence[str], folder: str | None, limit: int | None, batch_size: int
) -> dict[str, float]:
    """The first metric of each task, by `task metric`.

    Args:
        names: of tasks, as lm-eval spells them.
        folder: where more of them are described.
        limit: at most so many documents of each.

    Raises:
        InputError: if there is no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"There is no task '{name}'.{nearest(name, manager.all_tasks)}")
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    return dict(_first_metric(name, results) for name, results in found["results"].items())


def _first_metric(name: str, results: dict[str, Any]) -> tuple[str, float]:
    metric = next(key for key, value in results.items() if isinstance(value, float) and "stderr" not in key)
    return f"{name} {metric.partition(',')[0]}", results[metric]
