"""Observers condense many batches of an activation into a few representative values per group."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Observer(ABC):
    """Sees the view `[groups, elements]` of every calibration batch; the number of groups is constant."""

    @abstractmethod
    def update(self, view: Tensor) -> None:
        """Take in one batch."""

    @abstractmethod
    def summary(self) -> Tensor | None:
        """Representative values `[groups, n]` for `Quantizer.initialize_from`; None when nothing was seen."""


class MinMaxObserver(Observer):
    """Keeps the smallest and the largest value of each group."""

    def __init__(self) -> None:
        self._extremes: Tensor | None = None

    def update(self, view: Tensor) -> None:
        both = torch.stack(torch.aminmax(view.float(), dim=1), dim=1)
        seen = both if self._extremes is None else torch.cat([self._extremes, both], dim=1)
        self._extremes = torch.stack(torch.aminmax(seen, dim=1), dim=1)

    def summary(self) -> Tensor | None:
        return self._extremes


class MovingAverageObserver(Observer):
    """Averages the smallest and the largest value of each group over batches, later ones counting more.

    extremes <- decay * extremes + (1 - decay) * those of the batch, as in Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference (arXiv 1712.05877): one batch with an outlier moves little.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self._extremes: Tensor | None = None

    def update(self, view: Tensor) -> None:
        both = torch.stack(torch.aminmax(view.float(), dim=1), dim=1)
        self._extremes = both if self._extremes is None else torch.lerp(both, self._extremes, self.decay)

    def summary(self) -> Tensor | None:
        return self._extremes


class SampleObserver(Observer):
    """Keeps about `per_batch` random elements of each group of every batch, and its extremes: enough to fit to.

    Random, because evenly spaced ones of a flattened `[tokens, features]` can be those of a few features only.
    """

    def __init__(self, per_batch: int = 4096) -> None:
        self.per_batch = per_batch
        self._samples: list[Tensor] = []

    def update(self, view: Tensor) -> None:
        size = view.shape[1]
        if size > self.per_batch:
            generator = torch.Generator().manual_seed(len(self._samples))
            chosen = torch.randint(size, (self.per_batch,), generator=generator).to(view.device)
            low, high = torch.aminmax(view, dim=1, keepdim=True)
            view = torch.cat([view[:, chosen], low, high], dim=1)
        self._samples.append(view.float().clone())

    def summary(self) -> Tensor | None:
        return torch.cat(self._samples, dim=1) if self._samples else None
