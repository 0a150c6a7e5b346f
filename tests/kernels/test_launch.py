import pytest
import torch

from qat.kernels import launch as module
from qat.kernels.launch import launch


class Compiled:
    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.calls.append((grid, arguments))


class Kernel:
    """Stands for what `triton.jit` makes: compiles at every call, and says for what."""

    def __init__(self):
        self.compiled, self.form = [], Compiled()

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return self.form

        return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def forms(kernel, calls):
    """How many forms Triton is asked for."""
    for arguments, constants in calls:
        launch(kernel, 3, arguments, constants)
    return len(kernel.compiled)


def test_the_second_call_goes_to_what_was_compiled(kernel):
    x = torch.zeros(64)
    for n in (32, 48):
        launch(kernel, 3, (x, n), {"WIDTH": 8, "GRID": ("round", 1.0)})
    ((grid, arguments, options),) = kernel.compiled
    assert (grid, arguments[1]) == ((3,), 32)
    assert options == {"WIDTH": 8, "GRID": ("round", 1.0), "num_warps": 4, "enable_fp_fusion": False}
    ((grid, (_, n, width, constants)),) = kernel.form.calls
    assert (grid, n, width, constants) == ((3, 1, 1), 48, 8, ("round", 1.0))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((torch.zeros(4), 16), (torch.zeros(4).bfloat16(), 16)),
        ((torch.zeros(8), 16), (torch.zeros(8)[1:], 16)),  # four bytes off
        ((torch.zeros(4), 16), (torch.zeros(4), 17)),
        ((torch.zeros(4), 17), (torch.zeros(4), 1)),
        ((torch.zeros(4), 16), (torch.zeros(4), 2**31)),
        ((torch.zeros(4), 16), (torch.zeros(4), 16.0)),
    ],
)
def test_what_triton_compiles_anew_is_compiled_anew(kernel, first, second):
    assert forms(kernel, [(first, {"WIDTH": 8}), (second, {"WIDTH": 8})]) == 2


def test_constants_make_another_form(kernel):
    x = torch.zeros(4)
    assert forms(kernel, [((x,), {"WIDTH": 8}), ((x,), {"WIDTH": 16}), ((x,), {"WIDTH": 8})]) == 2


def test_the_interpreter_compiles_nothing(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **o: self.compiled.append(a))
    assert forms(kernel, [((torch.zeros(4),), {})] * 2) == 2
    assert not module._compiled
