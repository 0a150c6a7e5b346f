"""A signal ends the program wherever it arrives."""

import signal
import subprocess
import sys
import textwrap

import pytest

SWALLOWED = {
    "a finalizer": """
        class Held:
            def __del__(self):
                signal.raise_signal({number})
        held = Held()
        del held
    """,
    "the callback of a weak reference": """
        class Held:
            pass
        held = Held()
        reference = weakref.ref(held, lambda _: signal.raise_signal({number}))
        del held
    """,
    "plain code": "signal.raise_signal({number})",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("place", SWALLOWED)
def test_it_raises_and_what_is_under_way_ends_in_order(place, number):
    """`KeyboardInterrupt` is not what arrives, and nothing is printed of the exception that Python dropped."""
    work = textwrap.dedent(SWALLOWED[place]).format(number=int(number)).strip()
    program = f"""
import signal, time, weakref
from lightning_modules.signals import exit_on_signals
exit_on_signals()
try:
{textwrap.indent(work, "    ")}
    time.sleep(60)
except SystemExit:
    print("ended in order", flush=True)
    raise
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "ended in order\n", "")


def test_other_dropped_exceptions_are_reported_as_ever():
    program = """
from lightning_modules.signals import exit_on_signals
exit_on_signals()
class Held:
    def __del__(self):
        raise SystemExit(3)
Held()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0
    assert "Exception ignored in" in done.stderr
    assert "SystemExit: 3" in done.stderr
