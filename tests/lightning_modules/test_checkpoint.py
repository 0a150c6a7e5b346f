import errno
import os
import resource
import socket

import pytest
import torch

from lightning_modules.checkpoint import AtomicCheckpointIO
from qat.atomic import replaced_file, replaced_folder
from qat.errors import InputError
from tests.lightning_modules.test_cli import shell  # noqa: F401


def half_written_file(path):
    with replaced_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def half_written_folder(path):
    with replaced_folder(path) as temporary:
        (temporary / "new").touch()
        raise RuntimeError


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        half_written_file(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(RuntimeError):
        half_written_folder(path)
    assert [p.name for p in path.iterdir()] == ["old"]
    with replaced_folder(path) as temporary:
        (temporary / "new").touch()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def leave_behind(path, suffix):
    """What a process that was killed while writing leaves: its number is above the highest that Linux gives."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{2**22 + 1}.0123abcd.{suffix}")


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    path = tmp_path / "file"
    leave_behind(path, "tmp").write_text("half")
    living = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getppid()}.0123abcd.tmp")
    living.touch()
    with replaced_file(path) as temporary:
        temporary.write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([living, path])


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    path = tmp_path / "folder"
    (aside := leave_behind(path, "old")).mkdir()
    (aside / "old").touch()
    with pytest.raises(RuntimeError):
        half_written_folder(path)
    assert [p.name for p in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_process_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"
    with replaced_file(path) as first:
        first.write_text("first")
        with replaced_file(path) as second:
            second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_other_mistakes_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "the write failed, is the disk full"),
    ],
    ids=["full", "unwritable", "torch"],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path, monkeypatch, failure, message):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=f"{message}.*is intact"):
        io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert io.load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoints_load_without_executing_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"x": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")


def test_a_run_that_may_write_no_more_ends_with_one_line(shell):  # noqa: F811
    """A real run against a real limit: files may not grow beyond 200 kB, as on a full disk."""
    steps = ["callbacks.checkpoint.every_n_steps=4", "hydra.run.dir=run"]
    shell.run("trainer.max_steps=4", *steps, forks=True)
    checkpoint = shell.folder / "run" / "checkpoints" / "last.ckpt"
    before = checkpoint.read_bytes()
    assert len(before) > 200_000
    shell.preexec = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    error = shell.fails("resume=run", "trainer.max_steps=8", defaults=False)
    assert "Cannot write the checkpoint" in error
    assert "is intact" in error
    assert checkpoint.read_bytes() == before
