"""Rows of text: what a local file, a folder of files, or a dataset of the hub holds, one document each."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qat.errors import InputError, nearest

Row = dict[str, Any]
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
SEPARATOR = "<|endoftext|>"


def text_files(path: str | Path) -> list[Path]:
    """The readable files under `path`, in a fixed order.

    Raises:
        InputError: if there is nothing to read.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: unknown kind of file.{nearest(path.suffix, SUFFIXES)}")
        return [path]
    if not path.exists():
        siblings = [str(p) for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise InputError(f"There is no text at {path}.{nearest(str(path), siblings)}")
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"The folder {path} holds no text; files end in {', '.join(SUFFIXES)}.")
    return files


def read_rows(file: Path) -> Iterator[Row]:
    """Documents of one file: of a text, what lies between lines `<|endoftext|>`; of jsonl and parquet, its rows.

    Raises:
        InputError: if the file is binary, empty or malformed.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    found = False
    for row in readers.get(file.suffix, _read_text)(file):
        found = True
        yield row
    if not found:
        raise InputError(f"{file} is empty.")


def hub_rows(name: str, split: str, subset: str | None = None, streaming: bool = False) -> Iterable[Row]:
    """Rows of a dataset of the Hugging Face hub.

    Raises:
        InputError: if the dataset, subset or split does not exist or cannot be reached.
    """
    from datasets import load_dataset

    try:
        rows: Iterable[Row] = load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as error:  # datasets raises a dozen unrelated types here, down to its HTTP client's
        raise InputError(
            f"Cannot load the dataset '{name}' (subset {subset}, split {split}): {str(error).strip().splitlines()[0]}"
        ) from error
    return rows


def _read_text(file: Path) -> Iterator[Row]:
    paragraphs: list[str] = []
    for line in _lines(file):
        if line.strip() == SEPARATOR:
            if paragraphs:
                yield {"text": "\n".join(paragraphs)}
            paragraphs = []
        elif line.strip() or paragraphs:
            paragraphs.append(line)
    if any(paragraph.strip() for paragraph in paragraphs):
        yield {"text": "\n".join(paragraphs)}


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number} is no JSON object.")
        yield row


def _read_parquet(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except ArrowException as error:
        raise InputError(f"{file} is no readable parquet file: {error}.") from error


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as text:
            for line in text:
                if "\0" in line:
                    raise InputError(f"{file} is binary, not text.")
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
