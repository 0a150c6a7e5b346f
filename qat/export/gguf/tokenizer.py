"""The tokenizer in the metadata of GGUF: byte-level BPE, which is what llama.cpp calls gpt2.

llama.cpp splits text before it merges, by expressions that are in its source and have names there. A tokenizer whose
own splitting is not among those known here is written with the name `default`, and a warning.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

from gguf.constants import TokenType

from qat.errors import InputError

_LOGGER = logging.getLogger(__name__)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What is done to text before it is merged, as `_steps` tells it, by the name that llama.cpp has for it.
_SPLITS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "dbrx",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes", "whole words"): "llama-bpe",
    ("NFC", _WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_PROBE = "a"

Metadata = dict[str, Any]


def tokenizer_metadata(tokenizer: Any, vocab_size: int) -> Metadata:
    """What a file says of `tokenizer`; where llama.cpp has none like it, that there is none.

    Args:
        tokenizer: of transformers, or None.
        vocab_size: rows of the embedding; the tokenizer may know fewer tokens.

    Raises:
        InputError: if it knows more tokens than that.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    if not _is_byte_level(spec):
        kind = spec.get("model", {}).get("type", type(tokenizer).__name__)
        _LOGGER.warning(
            "The GGUF file gets no tokenizer: llama.cpp has byte-level BPE, and this one is %s. It takes token ids; "
            "the tokenizer's own files lie beside it.",
            kind,
        )
        return {"tokenizer.ggml.model": "no_vocab"}
    tokens, types = _tokens(spec, vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split_name(spec),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(pair) for pair in spec["model"]["merges"]],
        **_special(tokenizer),
    }


def _is_byte_level(spec: Metadata) -> bool:
    model = spec.get("model", {})
    steps = [step["type"] for step in _parts(spec.get("pre_tokenizer"), "pretokenizers")]
    return model.get("type") == "BPE" and not model.get("byte_fallback") and "ByteLevel" in steps


def _tokens(spec: Metadata, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and its type; ids without a token get one that no text has."""
    normal = {index: token for token, index in spec["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    largest = max((*normal, *added), default=0)
    if largest >= vocab_size:
        raise InputError(f"The tokenizer has a token {largest}, and the model has {vocab_size}: they are no pair.")
    tokens, types = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            types.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        else:
            tokens.append(normal.get(index, f"[PAD{index}]"))
            types.append(TokenType.NORMAL if index in normal else TokenType.UNUSED)
    return tokens, [int(kind) for kind in types]


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _special(tokenizer: Any) -> Metadata:
    """Ids of special tokens, whether text begins and ends with one, and the template of chats."""
    found: Metadata = {}
    for name, key in _SPECIAL.items():
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = index
    ids = tokenizer(_PROBE).input_ids
    found["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    found["tokenizer.ggml.add_space_prefix"] = False
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _split_name(spec: Metadata) -> str:
    """What llama.cpp calls the way in which text is split before it is merged."""
    name = _SPLITS.get(tuple(_steps(spec)))
    if name is None:
        _LOGGER.warning(
            "The tokenizer splits text in a way that has no name known here, so the GGUF file says 'default': "
            "llama.cpp may give other tokens than the model was trained with. Compare them before you use it."
        )
    return name or "default"


def _steps(spec: Metadata) -> Iterator[str]:
    """What the tokenizer does to text before it merges: a word for each step, an expression for itself."""
    for step in _parts(spec.get("normalizer"), "normalizers"):
        yield step["type"]
    for step in _parts(spec["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                yield "words" if use_regex else "bytes"
            case {"type": "Digits", "individual_digits": True}:
                yield "digits"
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                yield pattern
            case _:
                yield f"unknown {step['type']}"
    if spec["model"].get("ignore_merges"):
        yield "whole words"


def _parts(step: Any, name: str) -> list[Any]:
    """The steps of a sequence, or the one that is none."""
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]
