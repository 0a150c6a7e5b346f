"""Writing the texts of a model into a folder, batch by batch, so that nothing of it is written twice."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_modules.data.generated import DESCRIPTION, TOKENS, identity_of
from lightning_modules.data.windows import NOT_LEARNED
from lightning_modules.fingerprint import differences, of_model
from lightning_modules.models import LoadedModel
from lightning_modules.synthesis.sampling import first_tokens, sample_texts
from qat.atomic import replaced_file, replaced_folder
from qat.errors import InputError
from qat.options import require_whole

_FORMAT = 1
_PARTS = "parts"


@dataclass(frozen=True)
class Settings:
    """What texts depend on besides the model.

    The data-free distillation of "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (arXiv
    2305.17888): a text of likeliest tokens alone repeats itself, so tokens are drawn; but the first few decide where it
    goes, so these are the likeliest.

    Attributes:
        texts: how many.
        length: tokens of a text at most.
        greedy: the least and the most tokens after the first that are the likeliest; each text draws its number.
        temperature: divides the logits of those that are drawn, positive.
        batch_size: texts at a time; others draw other texts.
        seed: of first tokens and draws.

    Raises:
        InputError: if an option is out of range.
    """

    texts: int = 1000
    length: int = 512
    greedy: Sequence[int] = (3, 5)
    temperature: float = 1.0
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, usual, least in (("texts", 1000, 1), ("length", 512, 2), ("batch_size", 16, 1), ("seed", 0, 0)):
            require_whole(name, getattr(self, name), usual, least)
        if not isinstance(self.temperature, int | float) or not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature}; it divides logits: set it to 1.")
        pair = isinstance(self.greedy, Sequence) and len(self.greedy) == 2
        if not pair or not all(isinstance(tokens, int) for tokens in self.greedy) or not _ordered(*self.greedy):
            raise InputError(f"greedy is {self.greedy}; it is the least and the most tokens: set it to [3,5].")


def _ordered(least: int, most: int) -> bool:
    return 0 <= least <= most


def write(loaded: LoadedModel, folder: str | Path, settings: Settings, console: Console | None = None) -> Path:
    """Let a model write texts into `folder`, or go on with what was interrupted there, with the same bits.

    The folder then holds `tokens.npy`, all texts one after the other as `data.windows` reads tokens, and
    `synthesis.json`, which says what they depend on. First tokens are marked as not learned, because nothing predicts
    them.

    Args:
        loaded: the model, in evaluation mode, and its tokenizer.
        console: shows how many batches are done, and the time that remains.

    Returns:
        the path of the tokens.

    Raises:
        InputError: if the folder holds something else, or texts of other settings or of another model.
    """
    folder = Path(folder).expanduser()
    _claim(folder, _description(loaded, settings))
    if not (folder / TOKENS).is_file():
        _write_parts(loaded, folder, settings, console)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return folder / TOKENS


def _write_parts(loaded: LoadedModel, folder: Path, settings: Settings, console: Console | None) -> None:
    """Write the batches that are not there yet, and all of them as one."""
    first = first_tokens(_allowed(loaded.tokenizer), settings.texts, settings.seed).split(settings.batch_size)
    parts = [folder / _PARTS / f"{batch:06d}.npy" for batch in range(len(first))]
    todo = [batch for batch, part in enumerate(parts) if not part.is_file()]
    end = loaded.tokenizer.eos_token_id
    for batch in track(todo, f"{loaded.name} writes", console=console, transient=True):
        how = settings.length, settings.greedy, settings.temperature, end, settings.seed, batch
        _save(parts[batch], [as_tokens(text) for text in sample_texts(loaded.model, first[batch], *how)])
    _save(folder / TOKENS, [np.load(part) for part in parts])


def as_tokens(text: Tensor) -> np.ndarray:
    """A text as the data modules keep it, uint32, its first token marked as not learned."""
    tokens = text.numpy().astype(np.uint32)
    tokens[0] |= NOT_LEARNED
    return tokens


def _claim(folder: Path, description: dict[str, Any]) -> None:
    """Make the folder, or see that it is that of the same texts."""
    if not folder.exists():
        with replaced_folder(folder) as temporary:
            (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1))
        return
    if not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder} holds no texts of a model: give a folder that is not there.")
    compared = {name: value for name, value in description.items() if name != "name"}  # folders may be moved
    changed = differences(json.loads((folder / DESCRIPTION).read_text()), compared)
    if changed:
        raise InputError(f"{folder} was written with {changed}: give a folder of its own, or delete that one.")


def _description(loaded: LoadedModel, settings: Settings) -> dict[str, Any]:
    """What the texts depend on, as JSON has it."""
    device = next(loaded.model.parameters()).device.type  # another one rounds otherwise
    model = {"name": loaded.name, "model": of_model(loaded.model), "device": device}
    made = {"format": _FORMAT, **asdict(settings), **model, "tokenizer": identity_of(loaded.tokenizer)}
    described: dict[str, Any] = json.loads(json.dumps(made))
    return described


def _allowed(tokenizer: Any) -> list[int]:
    """Tokens that a text may start with: all but special ones."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _save(path: Path, parts: Sequence[np.ndarray]) -> None:
    with replaced_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(parts))
