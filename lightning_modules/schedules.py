"""Learning-rate schedules that transformers does not have in the shape that this project calls them."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_constant_schedule_with_warmup


def constant_with_warmup(optimizer: Optimizer, num_training_steps: int, **options: Any) -> LRScheduler:
    """Linear warm-up, then constant; `num_training_steps` makes no difference."""
    return get_constant_schedule_with_warmup(optimizer, **options)
