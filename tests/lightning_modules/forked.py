"""Scripts in processes of their own, forked from one that has imported what `train.py` imports.

Imports take four fifths of the time of a run of a tiny model.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["lightning_modules.pipeline", "transformers.models.llama.modeling_llama"])


class Forked:
    """`script` with `arguments`, as a `subprocess.Popen` of it with stdout and stderr in one."""

    def __init__(self, script, arguments, folder, environment):
        handle, output = tempfile.mkstemp(dir=folder.parent, prefix="output")
        os.close(handle)
        self._output = Path(output)
        given = (str(script), [*arguments], str(folder), dict(environment), output)
        self._process = _CONTEXT.Process(target=_run, args=given)
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def communicate(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout, self._output.read_text())
        return self._output.read_text(), None


def _run(script, arguments, folder, environment, output):
    with Path(output).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out
