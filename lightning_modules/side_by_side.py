"""The models of a command that shows artifacts beside what they were made from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_modules.models import LoadedModel
from lightning_modules.sizes import MIB, folder_bytes, full_bits, parameter_bytes, tensor_bytes
from qat import load
from qat.errors import InputError
from qat.export.artifact import bits_per_weight, check_artifact
from qat.export.loading import target_of

_ACCELERATORS = ("auto", "cpu")


class SideBySide:
    """What `artifact`, `model` and `reference` of a command choose; one artifact at a time is in memory.

    Args:
        cfg: composed from configs/evaluate.yaml or configs/generate.yaml.

    Raises:
        InputError: if nothing is chosen, or an artifact does not say how text becomes tokens.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_accelerator(cfg.accelerator)
        for key, least in (("seed", 0), ("threads", 1)):
            if cfg[key] is not None and (not isinstance(cfg[key], int) or cfg[key] < least):
                raise InputError(f"{key} is {cfg[key]}; it is a whole number from {least} on.")
        self._widths = _widths(cfg.bits)
        self._cfg, self.folders = cfg, [str(Path(folder).expanduser()) for folder in listed(cfg.artifact)]
        for folder in self.folders:
            if target_of(folder) is None:
                check_artifact(folder)
        if not self.folders and not cfg.reference:
            raise InputError("There is no model: give artifact=FOLDER, which a run exported, or reference=true.")
        OmegaConf.resolve(cfg)
        pl.seed_everything(cfg.seed, verbose=False)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.reference: LoadedModel | None = self._placed(instantiate(cfg.model)) if cfg.reference else None
        self.tokenizer = self.reference.tokenizer if self.reference else _tokenizer(self.folders[0])

    def artifacts(self) -> Iterator[LoadedModel]:
        """Every artifact, named by its folder, in evaluation mode; of nested codes once for each of `bits`."""
        for folder in self.folders:
            for bits in self._widths:
                model = load(folder, trust_remote_code=self._cfg.trust_remote_code, bits=bits)
                name = folder if bits is None else f"{folder}, {bits} bits"
                yield self._placed(LoadedModel(model, self.tokenizer, name))

    def all(self) -> Iterator[LoadedModel]:
        """The reference, if it is wanted, and the artifacts."""
        if self.reference is not None:
            yield self.reference
        yield from self.artifacts()

    def _placed(self, loaded: LoadedModel) -> LoadedModel:
        return placed(loaded, self._cfg.accelerator)


def check_accelerator(accelerator: str) -> None:
    """Refuse what is no `accelerator`.

    Raises:
        InputError: if so.
    """
    if accelerator not in _ACCELERATORS:
        raise InputError(f"accelerator is '{accelerator}': choose auto or cpu.")


def placed(loaded: LoadedModel, accelerator: str) -> LoadedModel:
    """A model in evaluation mode on a GPU, if there is one and `accelerator` is `auto`."""
    on_gpu = accelerator == "auto" and torch.cuda.is_available()
    return loaded._replace(model=loaded.model.to("cuda" if on_gpu else "cpu").eval())


def bits_of(loaded: LoadedModel, packed: bool) -> float:
    """Bits per quantized weight of an artifact; of a model in full precision, those of its dtype."""
    return bits_per_weight(loaded.model) if packed else full_bits(loaded.model)


def mib_of(loaded: LoadedModel, packed: bool) -> float:
    """What an artifact takes on disk; with some of its bits, and in full precision, a model's tensors."""
    if packed and Path(loaded.name).is_dir():
        return folder_bytes(loaded.name) / MIB
    return (tensor_bytes if packed else parameter_bytes)(loaded.model) / MIB


def listed(chosen: Any) -> list[str]:
    """An option that may be null, a word, or a list of words."""
    found = list(chosen) if isinstance(chosen, ListConfig) else [] if chosen is None else [chosen]
    return [str(word) for word in found]


def _widths(chosen: Any) -> list[int | None]:
    """The option `bits`: a whole number, or a list of them, or null."""
    found = list(chosen) if isinstance(chosen, ListConfig) else [chosen]
    for bits in found:
        if bits is not None and (not isinstance(bits, int) or bits < 1):
            raise InputError(f"bits is {chosen}; it is a whole number from 1 on, a list of them, or null.")
    return found or [None]


def check_positions(loaded: LoadedModel, tokens: int, mend: str) -> None:
    """Refuse to read more tokens at once than a model has positions for.

    Raises:
        InputError: if so.
    """
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise InputError(f"{loaded.name} knows {positions} positions, not {tokens}: {mend}")


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no tokenizer: choose the model that it was made from by model=hf model.name=..., and "
            "leave out reference=false."
        ) from error
