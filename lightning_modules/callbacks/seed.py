"""Randomness as a function of the position in training."""

import random
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds every generator before each batch from (seed, batch, process).

    Dropout and stochastic rounding then depend on where training stands and on nothing that happened before: a run
    that was killed and resumed draws the same numbers as one that was not, with no generator state to store.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        position = trainer.fit_loop.epoch_loop.total_batch_idx
        value = (self.seed * 1_000_003 + position * trainer.world_size + trainer.global_rank) % 2**32
        torch.manual_seed(value)
        np.random.seed(value)
        random.seed(value)
