from importlib.util import find_spec

import pytest
import torch

from qat.kernels.codebook_means import reference
from qat.kernels.ops import lloyd_step_
from tests.kernels.interpreter import interpreted

CASES = {
    "a codebook a row": (6, 200, 6, 8),
    "three groups share one": (6, 32, 2, 4),
    "one for everything": (5, 70, 1, 16),
    "one long row": (1, 9000, 1, 3),
}


def case(groups, elements, rows, entries, device="cpu"):
    scale = torch.rand(groups, 1, device=device) + 0.5
    x = torch.randn(groups, elements, device=device) * scale
    return x, scale, torch.randn(rows, entries, device=device)


def stepped(x, scale, codebook, importance=None, step=lloyd_step_):
    """The codebook after the step, which works in place."""
    moved = codebook.clone()
    step(x, scale, moved, importance)
    return moved


def means_of_members(x, scale, codebook, weights):
    """One row and entry after the other."""
    rows = len(codebook)
    v, w = (x / scale).view(rows, -1), weights.reshape(rows, -1)
    nearest = (v[:, :, None] - codebook[:, None]).abs().argmin(2)
    found = codebook.clone()
    for row in range(rows):
        for k in range(codebook.shape[1]):
            own = nearest[row] == k
            found[row, k] = (v[row][own] * w[row][own]).sum() / w[row][own].sum()
    return found


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [2**18, 64], ids=["one piece", "many pieces"])
def test_entries_move_to_the_means_of_their_members(name, weighted, piece, monkeypatch):
    monkeypatch.setattr(reference, "_PIECE_OF_A_CPU", piece)
    x, scale, codebook = case(*CASES[name])
    weights = torch.rand_like(x) + 0.1 if weighted else None
    expected = means_of_members(x, scale, codebook, torch.ones_like(x) if weights is None else weights)
    assert torch.isfinite(expected).all()  # none is dead
    assert torch.allclose(stepped(x, scale, codebook, weights), expected, atol=1e-4)


def squared_error(x, codebook):
    return (x[:, :, None] - codebook[:, None]).square().min(2).values.sum(1)


def test_dead_entries_go_where_the_error_is():
    x = torch.cat([torch.rand(3, 400), 10 + 0.01 * torch.rand(3, 400)], dim=1)
    codebook = torch.tensor([[0.5, 10.0, 50.0, 60.0]]).expand(3, -1).contiguous()
    moved = stepped(x, torch.ones(3, 1), codebook)
    assert ((moved > 0) & (moved < 1)).sum() == 9  # of four, only one is left for the narrow cluster
    assert (squared_error(x, moved) < 0.2 * squared_error(x, codebook)).all()


def test_dead_entries_stay_where_nothing_can_be_gained():
    x = torch.ones(2, 50)
    codebook = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, -1).contiguous()
    assert torch.equal(stepped(x, torch.ones(2, 1), codebook), codebook)


def test_the_operator_is_well_formed():
    x, scale, codebook = case(*CASES["a codebook a row"])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qat.lloyd_step_, (x, scale, codebook, None), test_utils=checks)


def compare_triton_with_the_reference(device):
    """Values, weights, and dead entries; run in a process of its own for the interpreter."""
    from qat.kernels.codebook_means import triton

    torch.manual_seed(0)
    for sizes in CASES.values():
        x, scale, codebook = case(*sizes, device=device)
        codebook[:, -1] = 50.0  # dead
        for weights in (None, torch.rand_like(x)):
            expected, found = (stepped(x, scale, codebook, weights, m.lloyd_step_) for m in (reference, triton))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_in_the_interpreter_equals_the_reference():
    interpreted(__name__, "compare_triton_with_the_reference('cpu')")


@pytest.mark.gpu
def test_triton_equals_the_reference():
    compare_triton_with_the_reference("cuda")


@pytest.mark.gpu
def test_the_same_weights_give_the_same_bits():
    x, scale, codebook = case(1, 2**20, 1, 8, device="cuda")
    assert torch.equal(stepped(x, scale, codebook), stepped(x, scale, codebook))
