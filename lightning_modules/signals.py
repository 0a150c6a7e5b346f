"""Ctrl-C and SIGTERM end the program by an exception, so that what is under way can say how to go on."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_AGAIN_AFTER_S = 0.1


def exit_on_signals() -> None:
    """Let SIGINT and SIGTERM raise `SystemExit(128 + number)`, wherever they arrive.

    Python drops an exception that is raised in a finalizer or in the callback of a weak reference, of which importing
    torch runs thousands. A signal whose exception was dropped is sent once more.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _terminate)
    sys.unraisablehook = _send_again


def _terminate(number: int, frame: FrameType | None) -> None:
    # Not KeyboardInterrupt, which Lightning turns into an exit code of its own.
    raise SystemExit(128 + number)


def _send_again(dropped: Any) -> None:
    number = getattr(dropped.exc_value, "code", None)
    if not isinstance(dropped.exc_value, SystemExit) or number not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        sys.__unraisablehook__(dropped)
        return
    # From another thread and a little later: by then this one has left what swallowed the exception.
    threading.Timer(_AGAIN_AFTER_S, os.kill, (os.getpid(), number - 128)).start()
