"""The kernel of divergences against their reference, which is `LogitLoss` in plain PyTorch."""

from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from lightning_modules.distillation.divergences import DIVERGENCES
from qat.kernels.ops import reference_kernels
from tests.kernels.interpreter import interpreted
from tests.lightning_modules.distillation.test_divergences import OPTIONS, loss_of

# Rows and vocabularies: odd ones, one row, and one in several tiles.
SIZES = [(5, 97), (3, 300), (1, 64)]
LARGE = [(2, 20_001)]


@contextmanager
def tiles_of(width):
    from qat.kernels.logits import divergence

    before, divergence._WIDTH = divergence._WIDTH, width
    divergence._ready.cache_clear()
    yield
    divergence._WIDTH = before
    divergence._ready.cache_clear()


def logits(rows, columns, dtype):
    torch.manual_seed(rows)
    z, z_teacher = (4 * torch.randn(2, rows, columns)).to(dtype)
    targets = torch.randint(columns, (rows,))
    targets[::4] = -100
    return z, z_teacher, targets


def compare(name, device, dtype=torch.float32, sizes=SIZES):
    rtol = 1e-4 if dtype == torch.float32 else 1e-2
    for rows, columns in sizes:
        for options in (options for options in OPTIONS.values() if "top_k" not in options):
            loss, (z, z_teacher, targets) = loss_of(name, **options), logits(rows, columns, dtype)
            with reference_kernels():
                expected = loss(z.clone(), z_teacher.clone(), targets)
            for with_gradient in (True, False):
                own = [tensor.clone().to(device) for tensor in (z, z_teacher, targets)]
                found = loss._fused(*own, with_gradient)
                what = f"{name} {rows} {columns} {options}"
                for a, b in zip(found[:2], expected[:2], strict=True):
                    torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4, msg=what)
                assert (found.gradient is not None) is with_gradient
                if with_gradient:
                    torch.testing.assert_close(found.gradient.cpu(), expected.gradient, rtol=rtol, atol=1e-5)


def compare_spoilt(device):
    """NaN stays NaN, and 0 where a row does not count; a word without any probability is none at all."""
    for name in DIVERGENCES:
        loss, (z, z_teacher, targets) = loss_of(name, weight=0.5), logits(8, 300, torch.float32)
        z[1, 7], z_teacher[2, 200], z[4, 3], targets[7] = *(float("nan"),) * 3, 300
        found = loss._fused(*(tensor.to(device) for tensor in (z, z_teacher, targets)), True)
        assert found.divergence.isnan().tolist() == [False, True, True, *[False] * 5]
        assert found.cross_entropy.isnan().tolist() == [False, True, *[False] * 5, True]
        assert (found.gradient[targets == -100] == 0).all()

        z, z_teacher, targets = logits(3, 300, torch.float32)
        z[:, 100:], z_teacher[:, 100:], targets[1:] = -torch.inf, -torch.inf, torch.tensor([5, 6])
        found = loss._fused(*(tensor.clone().to(device) for tensor in (z, z_teacher, targets)), True)
        with reference_kernels():
            expected = loss(z[:, :100].clone(), z_teacher[:, :100].clone(), targets)
        torch.testing.assert_close(found.divergence.cpu(), expected.divergence, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.gradient[:, :100].cpu(), expected.gradient, rtol=1e-4, atol=1e-5)
        assert (found.gradient[:, 100:] == 0).all()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("call", "width"),
    [
        *((f"compare('{name}', 'cpu')", 64) for name in DIVERGENCES),
        *(("compare('cakld', 'cpu', sizes=LARGE)", 4096), ("compare_spoilt('cpu')", 64)),
    ],
)
def test_triton_in_the_interpreter_equals_the_reference(call, width):
    interpreted(__name__, f"with tiles_of({width}): {call}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_triton_equals_the_reference(name, dtype):
    compare(name, "cuda", dtype, SIZES + LARGE)
    with tiles_of(64):
        compare(name, "cuda", dtype)


@pytest.mark.gpu
def test_nan_on_the_gpu():
    with tiles_of(64):
        compare_spoilt("cuda")
