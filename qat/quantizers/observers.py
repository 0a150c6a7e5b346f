"""Observers condense many batches of an activation into a few representative values per group."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

# Samples of all groups together, and the fewest of one.
_TOTAL, _LEAST = 2**20, 2**8
# No seed that anyone takes for data: draws from the same stream would choose by the values.
_SEED = 0x2545F4914F6CDD1D


class Observer(ABC):
    """Sees the view `[groups, elements]` of every calibration batch; the number of groups is constant.

    Attributes:
        finite: whether everything that was seen is a finite number.
    """

    def __init__(self) -> None:
        self.finite: Tensor | bool = True

    @final
    def update(self, view: Tensor) -> None:
        """Take in one batch; one without elements, as of an expert without tokens, says nothing."""
        if view.numel():
            self.finite = torch.isfinite(view).all() & self.finite
            self._take(view)

    @abstractmethod
    def _take(self, view: Tensor) -> None:
        """Take in one batch that has elements."""

    @abstractmethod
    def summary(self) -> Tensor | None:
        """Representative values `[groups, n]` for `Quantizer.initialize_from`; None when nothing was seen."""


class MinMaxObserver(Observer):
    """Keeps the smallest and the largest value of each group."""

    def __init__(self) -> None:
        super().__init__()
        self._extremes: Tensor | None = None

    def _take(self, view: Tensor) -> None:
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
        super().__init__()
        self.decay = decay
        self._extremes: Tensor | None = None

    def _take(self, view: Tensor) -> None:
        both = torch.stack(torch.aminmax(view.float(), dim=1), dim=1)
        self._extremes = both if self._extremes is None else torch.lerp(both, self._extremes, self.decay)

    def summary(self) -> Tensor | None:
        return self._extremes


class SampleObserver(Observer):
    """Keeps elements of each group, drawn evenly from all batches: enough to fit to, or to find quantiles of.

    Every position of a batch draws a random number, and the positions with the smallest ones of all batches stay.
    Evenly spaced positions of a flattened `[tokens, features]` could be those of a few features only.

    Args:
        most: how many elements of a group to keep; where all groups together would have more than 2^20, fewer, but not
            below 256.
    """

    _draws: Tensor
    _generator: torch.Generator

    def __init__(self, most: int = 2**14) -> None:
        super().__init__()
        self.most = most
        self._samples: Tensor | None = None

    def _take(self, view: Tensor) -> None:
        if self._samples is None:
            self._samples, self._draws = view[:, :0].float(), torch.empty(0, device=view.device)
            self._generator = torch.Generator(view.device).manual_seed(_SEED)
        held, size = len(self._draws), max(_LEAST, min(self.most, _TOTAL // len(view)))
        fresh = torch.rand(view.shape[1], generator=self._generator, device=view.device)
        draws = torch.cat([self._draws, fresh])
        kept = draws.topk(min(size, len(draws)), largest=False, sorted=False).indices.sort().values
        old, new = kept[kept < held], kept[kept >= held] - held
        self._samples = torch.cat([self._samples[:, old], view[:, new].float()], dim=1)
        self._draws = draws[kept]

    def summary(self) -> Tensor | None:
        return self._samples
