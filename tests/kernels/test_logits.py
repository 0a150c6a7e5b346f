"""The kernel of cross entropies and their gradients against the reference."""

import math
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from qat.kernels.cross_entropy import linear_cross_entropy
from qat.kernels.logits import reference
from qat.kernels.ops import reference_kernels
from tests.kernels.interpreter import interpreted

# Rows and vocabularies: odd ones, one row, and one in several tiles.
SIZES = [(5, 97), (3, 300), (1, 64)]
LARGE = [(2, 20_001)]
SHAPES = [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 5.0)]


@contextmanager
def tiles_of(width):
    from qat.kernels.logits import triton

    before, triton._WIDTH = triton._WIDTH, width
    yield
    triton._WIDTH = before


def compare(device, dtype=torch.float32, sizes=SIZES):
    from qat.kernels.logits import triton

    torch.manual_seed(0)
    for (rows, columns), shape, with_gradient in product(sizes, SHAPES, [True, False]):
        z, targets = 4 * torch.randn(rows, columns), torch.randint(columns, (rows,))
        z, targets[::4], what = z.to(dtype), -100, (rows, columns, shape)
        losses, dz = reference.loss_and_gradient(z.clone(), targets, *shape, -100, with_gradient)
        own_losses, own_dz = triton.loss_and_gradient(z.to(device), targets.to(device), *shape, -100, with_gradient)
        torch.testing.assert_close(own_losses.cpu(), losses, rtol=1e-4, atol=1e-4, msg=str(what))
        assert (own_dz is not None) is with_gradient
        if dz is not None:
            torch.testing.assert_close(own_dz.cpu(), dz, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5)


def compare_spoilt(device):
    """NaN among the logits is NaN in the loss, a target that is no word too; where a row does not count, it is 0."""
    from qat.kernels.logits import triton

    for wrong in (40, -1):
        targets = torch.tensor([3, wrong], device=device)
        losses, _ = triton.loss_and_gradient(torch.randn(2, 40, device=device), targets, 1.0, None, -100, True)
        assert losses.isnan().tolist() == [False, True]
    masked, targets = torch.randn(1, 200), torch.tensor([150])
    masked[:, :100] = -math.inf  # more than a tile
    expected = reference.loss_and_gradient(masked.clone(), targets, 1.0, None, -100, True)
    found = triton.loss_and_gradient(masked.to(device), targets.to(device), 1.0, None, -100, True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    z, targets = torch.randn(2, 40, device=device), torch.tensor([3, -100], device=device)
    z[:, 7] = float("nan")
    losses, dz = triton.loss_and_gradient(z, targets, 1.0, None, -100, True)
    assert losses[0].isnan()
    assert losses[1] == 0
    assert (dz[1] == 0).all()


def compare_times(device, dtype=torch.float32):
    from qat.kernels.logits import triton

    for shape in [(3, 5), (2048,), (1, 4099)]:
        total, factor = torch.randn(shape), torch.tensor(0.3)
        found = triton.times(total.to(device), factor.to(device), dtype)
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), reference.times(total, factor, dtype))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("call", "width"),
    [
        *(("compare('cpu')", 8192), ("compare('cpu')", 64), ("compare('cpu', sizes=LARGE)", 8192)),
        *(("compare_spoilt('cpu')", 64), ("compare_times('cpu')", 8192)),
    ],
)
def test_triton_in_the_interpreter_equals_the_reference(call, width):
    interpreted(__name__, f"with tiles_of({width}): {call}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_the_reference(dtype):
    compare("cuda", dtype, SIZES + LARGE)
    compare_times("cuda", dtype)
    with tiles_of(64):
        compare("cuda", dtype)


@pytest.mark.gpu
def test_nan_on_the_gpu():
    with tiles_of(64):
        compare_spoilt("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_the_whole_loss_on_the_gpu(bias):
    """Of chunks in bfloat16, whose products are summed in float32."""
    torch.manual_seed(0)
    shapes = [(300, 64), (1000, 64), *([(1000,)] if bias else [])]
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    targets = torch.randint(1000, (300,), device="cuda")
    targets[::7] = -100
    arguments = *leaves, *([] if bias else [None]), targets, 128

    def found():
        loss = linear_cross_entropy(*arguments)
        return loss, torch.autograd.grad(loss, leaves)

    loss, gradients = found()
    with reference_kernels():
        expected, expected_gradients = found()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() < 1e-2 * b.norm()
