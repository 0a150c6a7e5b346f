"""What a model can be shipped as, and what every way of shipping offers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from qat.errors import InputError
from qat.export.consumers import Consumer
from qat.export.grids import LayerGrid, layer_grids
from qat.export.layouts.base import Misfit
from qat.nn.kv_quantizer import kv_layers


class Target(ABC):
    """A kind of folder that a converted model is written to, and read back from.

    Attributes:
        title: what people call it.
        exact_engine: whether the engine multiplies the very values, so that only its sums may run in another order.
        most_kl: what an engine may diverge from the trained model, in nats a token.
    """

    title: str
    exact_engine: bool = True
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


def stored_grids(title: str, model: nn.Module) -> dict[str, LayerGrid]:
    """The grids of the quantized layers of `model`, for a target that stores such layers.

    Raises:
        InputError: if there are none.
    """
    grids = layer_grids(model)
    if not grids:
        raise InputError(f"{title} stores quantized layers, and the scheme has none: choose scheme=w4.")
    return grids


def refuse_cache(title: str, model: nn.Module) -> None:
    """Refuse quantized keys and values.

    Raises:
        InputError: if there are some.
    """
    if any(True for _ in kv_layers(model)):
        raise InputError(f"{title} has no place for a quantized KV cache: set kv@scheme.kv=none.")


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
