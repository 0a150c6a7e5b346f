"""Observers condense many batches of an activation into a few representative values per group."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_MOST_OF_A_BATCH = 2**20


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
    """Keeps random elements of each group of every batch: enough to fit to.

    Random, because evenly spaced ones of a flattened `[tokens, features]` can be those of a few features only.

    Args:
        per_batch: how many of each group; fewer where groups are so many that a batch would keep more than 2^20.
        extremes: keep each batch's extremes too, for scales that shall hold everything. They are no random elements:
            leave them out to find quantiles.
    """

    def __init__(self, per_batch: int = 4096, extremes: bool = True) -> None:
        self.per_batch, self.extremes = per_batch, extremes
        self._samples: list[Tensor] = []

    def update(self, view: Tensor) -> None:
        groups, size = view.shape
        most = max(1, min(self.per_batch, _MOST_OF_A_BATCH // groups))
        if size > most:
            generator = torch.Generator().manual_seed(len(self._samples))
            chosen = torch.randint(size, (most,), generator=generator).to(view.device)
            ends = torch.aminmax(view, dim=1, keepdim=True) if self.extremes else ()
            view = torch.cat([view[:, chosen], *ends], dim=1)
        self._samples.append(view.float().clone())

    def summary(self) -> Tensor | None:
        return torch.cat(self._samples, dim=1) if self._samples else None
