"""Triton's interpreter, which must be chosen before Triton is imported, and so runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def interpreted(module: str, statement: str) -> None:
    """Run `statement` in the interpreter, with everything that the tests of `module` define."""
    code = f"from {module} import *\n{statement}"
    subprocess.run([sys.executable, "-c", code], cwd=_ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
