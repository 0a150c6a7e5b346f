"""Text that a model wrote for its own training, already as tokens."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.data.module import TextDataModule
from lightning_modules.data.windows import Windows, tokenizer_identity
from qat.errors import InputError

TOKENS, DESCRIPTION = "tokens.npy", "synthesis.json"
_MEND = "qat-synthesize folder=... writes such a folder."


class GeneratedDataModule(TextDataModule):
    """What `qat-synthesize` wrote, token by token as the model wrote it, without decoding and encoding again.

    Args:
        tokenizer: of the model that wrote it.
        path: the folder.
        val_path: a text to evaluate on, of any kind that `TextDataModule` reads; None holds back the last `val_share`
            of the generated windows.
        options: see `TextDataModule`.

    Raises:
        InputError: if the folder holds no such text, or one of other tokens, or is not complete.
    """

    def _read_train(self) -> Windows:
        folder = Path(self.path).expanduser()
        if not (folder / DESCRIPTION).is_file():
            raise InputError(f"data.path={self.path} holds no text of a model. {_MEND}")
        made = json.loads((folder / DESCRIPTION).read_text())
        if made["tokenizer"] != identity_of(self.tokenizer):
            raise InputError(
                f"data.path={self.path} has the tokens of {made['name']}, and this model has others: train that one, "
                "or let this one write."
            )
        if not (folder / TOKENS).is_file():
            raise InputError(f"data.path={self.path} is not complete: give the command that writes it again.")
        return Windows(np.load(folder / TOKENS, mmap_mode="r"), self.sequence_length, "generated text")


def identity_of(tokenizer: Any) -> str:
    """A hash of everything about `tokenizer` that tokens depend on."""
    return hashlib.sha256(json.dumps(tokenizer_identity(tokenizer)).encode()).hexdigest()[:16]
