"""Tasks of lm-eval, by its own library (EleutherAI, "A framework for few-shot language model evaluation")."""

import importlib.util
import logging
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lightning_modules.models import LoadedModel
from qat.errors import InputError


def check_tasks(names: Sequence[str], folder: str | None, limit: int | None) -> None:
    """Refuse tasks that cannot run, before a model is loaded.

    Raises:
        InputError: if the library, the folder or a task is missing.
    """
    if not names and (folder is not None or limit is not None):
        raise InputError("task_folder and task_limit are for tasks, and there is none: add tasks=[NAME].")
    if names and importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks needs a package: pip install 'lightning-qat[eval]', or leave it out.")
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"task_folder is '{folder}', and there is no such folder.")
    if names:
        known = _manager(folder).all_tasks
        for name in names:
            if name not in known:
                raise InputError(f"There is no task '{name}'. Did you mean '{_most_like(name, known)}'?")


def _manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=folder)


def _most_like(name: str, known: Sequence[str]) -> str:
    """Of thousands, too many to list."""
    return max(known, key=lambda other: SequenceMatcher(None, name, other).ratio())


def task_scores(
    loaded: LoadedModel, names: Sequence[str], folder: str | None, limit: int | None, batch_size: int
) -> dict[str, float]:
    """The first metric of each task, by `task metric`; of a group without one nothing.

    Args:
        names: of tasks, as lm-eval spells them.
        folder: where more of them are described.
        limit: at most so many documents of each.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(folder)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    found = simple_evaluate(model, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    return dict(part for name, results in found["results"].items() for part in _first_metric(name, results))


def _first_metric(name: str, results: dict[str, Any]) -> list[tuple[str, float]]:
    metrics = [key for key, value in results.items() if isinstance(value, float) and "stderr" not in key]
    return [(f"{name} {metric.partition(',')[0]}", results[metric]) for metric in metrics[:1]]
