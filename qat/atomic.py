"""Files and folders that appear complete or not at all."""

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on failure it is removed."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on failure it is removed.

    A folder that stood there is moved aside first and removed last. Should the process die in between, `recover` puts
    it back.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary, previous = _beside(path, "tmp"), _beside(path, "old")
    temporary.mkdir()
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        if path.exists():
            os.replace(path, previous)
        try:
            os.replace(temporary, path)
        except OSError:
            if previous.exists():
                os.replace(previous, path)
            raise
        _sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    """A hidden name next to `path` of its own, that tells which process it belongs to."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:8]}.{suffix}")


def recover(path: str | Path) -> None:
    """Clear away what processes of this machine that were killed left beside `path`, and put back what they moved."""
    path = Path(path).absolute()
    for left in path.parent.glob(glob.escape(f".{path.name}.{socket.gethostname()}.") + "*"):
        _, process, _, suffix = left.name.rsplit(".", 3)
        if suffix not in ("tmp", "old") or not process.isdigit() or _alive(int(process)):
            continue
        if suffix == "old" and not path.exists():
            os.replace(left, path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Have the system write `path` out before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
