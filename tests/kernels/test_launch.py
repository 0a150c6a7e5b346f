import pytest
import torch

from qat.kernels.launch import Launch


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


def test_the_second_call_goes_to_what_was_compiled():
    kernel, x, y = Kernel(), torch.zeros(64), torch.ones(64)
    ready = Launch(kernel, 3, (32, 0.5), {"WIDTH": 8, "GRID": ("round", 1.0)}, num_warps=2)
    ready(x)
    ready(y)
    ((grid, arguments, options),) = kernel.compiled
    assert (grid, arguments) == ((3,), (x, 32, 0.5))
    assert options == {"WIDTH": 8, "GRID": ("round", 1.0), "num_warps": 2, "enable_fp_fusion": False}
    ((grid, (tensor, *rest)),) = kernel.form.calls
    assert tensor is y
    assert (grid, rest) == ((3, 1, 1), [32, 0.5, 8, ("round", 1.0)])


@pytest.mark.parametrize(
    ("other", "forms"),
    [
        (torch.zeros(8), 1),
        (torch.zeros(4).bfloat16(), 2),
        (torch.zeros(8)[1:], 2),  # four bytes off
        (torch.zeros(8)[4:], 1),
    ],
)
def test_what_triton_compiles_anew_is_compiled_anew(other, forms):
    kernel = Kernel()
    ready = Launch(kernel, 3, (16,), {"WIDTH": 8})
    ready(torch.zeros(4))
    ready(other)
    assert len(kernel.compiled) == forms


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: lambda *a, **o: self.compiled.append(a))
    kernel = Kernel()
    ready = Launch(kernel, 3, (), {})
    for _ in range(2):
        ready(torch.zeros(4))
    assert len(kernel.compiled) == 2


def test_numbers_that_change_come_after_the_tensors():
    kernel, x = Kernel(), torch.zeros(64)
    ready = Launch(kernel, 3, (32,), {"WIDTH": 8})
    for length in (5, 6):
        ready(x, changing=(length, 0.5))
    ((_, arguments, _),) = kernel.compiled
    assert arguments == (x, 5, 0.5, 32)
    assert kernel.form.calls == [((3, 1, 1), (x, 6, 0.5, 32, 8))]
