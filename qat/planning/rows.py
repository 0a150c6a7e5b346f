"""Work that takes long: shown as it goes on, and kept so that it need not be done twice."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from qat.atomic import replaced_file
from qat.transforms.blocks import progress_bar

Item = TypeVar("Item")
Key = tuple[str | int, ...]


class Rows:
    """Numbers by key, as JSON lines `[key, ..., number]` of a file: what a process that was killed has not lost.

    A line that the kill cut short is dropped when the file is next read.

    Args:
        path: of the file; None keeps them in memory only.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._found: dict[Key, float] = {}
        if self._path is not None and self._path.is_file():
            self._read(self._path)

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> float:
        return self._found[key]

    def add(self, key: Key, value: float) -> None:
        """Keep one number."""
        self._found[key] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(_line(key, value))

    def _read(self, path: Path) -> None:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        for line in whole.splitlines():
            *key, value = json.loads(line)
            self._found[tuple(key)] = value
        if whole != text:
            with replaced_file(path) as temporary:
                temporary.write_text(whole)


def _line(key: Key, value: float) -> str:
    return json.dumps([*key, value]) + "\n"


def tracked(items: Sequence[Item], title: str) -> Iterator[Item]:
    """`items`, with a bar that shows how many are done and the time that remains."""
    with progress_bar() as progress:
        yield from progress.track(items, description=title)
