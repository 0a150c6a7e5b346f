"""What a model can be shipped as, and what every way of shipping offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qat.errors import InputError
from qat.export.consumers import Consumer
from qat.export.layouts.base import Misfit


class Target(ABC):
    """A kind of folder that a converted model is written to, and read back from.

    Attributes:
        title: what people call it.
        most_kl: what an engine may diverge from the trained model, in nats a token.
    """

    title: str
    most_kl: float = 1e-2

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse a prepared or converted model, on any device, that the target cannot hold to the bit.

        Raises:
            InputError: naming a layer, the reason, and the options that train the nearest grid that fits.
        """

    @abstractmethod
    def write(self, model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write a converted `model` to `folder`, completely or not at all; what stood there is replaced.

        Raises:
            InputError: as `check`, and where `folder` holds files of another kind.
        """

    @abstractmethod
    def read(self, folder: str | Path, trust_remote_code: bool = False) -> nn.Module:
        """What `write` wrote, as a converted model in evaluation mode.

        Raises:
            InputError: if the folder is damaged, or something else.
        """

    def consumer(self, folder: Path) -> Consumer | None:
        """The engine that serves `folder`, having loaded it; None where that is this project.

        Raises:
            NotInstalled: if it is not in this environment.
        """
        return None


def refuse(title: str, name: str, misfits: Iterable[Misfit]) -> None:
    """Refuse the layer `name` if there are any misfits.

    Raises:
        InputError: with all reasons, and all options that mend them.
    """
    found = list(misfits)
    if not found:
        return
    reasons = ", ".join(misfit.reason for misfit in found)
    mends = " ".join(dict.fromkeys(misfit.mend for misfit in found))
    raise InputError(f"{title} cannot hold {name}, which has {reasons}. The nearest that it holds: {mends}")
