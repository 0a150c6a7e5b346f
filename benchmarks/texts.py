"""Tokens of the texts that accuracy is measured on."""

from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lightning_modules.models import load_smollm2
from qat.atomic import replaced_file

SEPARATOR = "<|endoftext|>"
TRAIN, VAL = "train.uint16", "wiki106.val.uint16"


def windows(folder: Path, length: int) -> tuple[Tensor, Tensor]:
    """Windows `[n, length]` (int32) of the training texts and of wiki106.val, in the tokens of SmolLM2.

    All `*.train.txt` are joined in the order of their names. The token files stay in the folder, 2 bytes a token; they
    alone are enough.
    """
    return _windows(folder, TRAIN, "*.train.txt", length), _windows(folder, VAL, "wiki106.val.txt", length)


def calibration(train: Tensor, count: int) -> Tensor:
    """`count` windows of the training texts (int64), drawn once."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return train[order[:count]].to(torch.int64)


def _windows(folder: Path, name: str, pattern: str, length: int) -> Tensor:
    path = folder / name
    if not path.is_file():
        texts = sorted(folder.glob(pattern))
        if not texts:
            raise SystemExit(f"{folder} holds neither {name} nor {pattern}.")
        tokenizer = load_smollm2("~/.cache/lightning-qat").tokenizer
        tokens = [token for text in texts for token in _tokens(text, tokenizer)]
        with replaced_file(path) as temporary:
            numpy.array(tokens, dtype=numpy.uint16).tofile(temporary)
    tokens = torch.from_numpy(numpy.fromfile(path, dtype=numpy.uint16).astype(numpy.int32))
    return tokens[: len(tokens) // length * length].view(-1, length)


def _tokens(path: Path, tokenizer: AutoTokenizer) -> list[int]:
    documents = [part.strip() for part in path.read_text().split(SEPARATOR)]
    ids = tokenizer([part for part in documents if part], add_special_tokens=False, verbose=False)["input_ids"]
    return [token for document in ids for token in (*document, tokenizer.eos_token_id)]
