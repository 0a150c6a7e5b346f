import pytest
import torch

from qat.numerics.kmeans import soft
from qat.numerics.kmeans.soft import soft_assign


def plain(v, codebook, temperature):
    shares = (-(v[:, :, None] - codebook[:, None]).square() / temperature).softmax(2)
    return (shares * codebook[:, None]).sum(2)


@pytest.mark.parametrize("cells", [2**22, 24], ids=["one block", "many blocks"])
def test_value_and_gradients_are_those_of_the_plain_expression(cells, monkeypatch):
    monkeypatch.setattr(soft, "_CELLS", cells)
    v, codebook = torch.randn(3, 50, requires_grad=True), torch.randn(3, 8).sort().values.requires_grad_()
    g = torch.randn(3, 50)
    ours, expected = soft_assign(v, codebook, 0.3), plain(v, codebook, 0.3)
    assert torch.allclose(ours, expected, atol=1e-6)
    gradients = (torch.autograd.grad(y, [v, codebook], g) for y in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cold_is_the_nearest_entry():
    v, codebook = torch.randn(2, 100), torch.tensor([[-1.0, 0.0, 1.0]]).expand(2, -1)
    nearest = codebook.gather(1, (v[:, :, None] - codebook[:, None]).abs().argmin(2))
    far_from_ties = ((v.abs() - 0.5).abs() > 0.01).float()
    assert torch.allclose(soft_assign(v, codebook, 1e-4) * far_from_ties, nearest * far_from_ties, atol=1e-4)


def test_nothing_of_the_size_of_weights_times_entries_is_kept():
    v, codebook = torch.randn(4, 1000, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        soft_assign(v, codebook, 0.1)
    assert max(kept) == v.numel()
