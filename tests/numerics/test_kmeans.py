import torch

from qat.numerics.kmeans import kmeans_1d


def error(x, centroids):
    return (x[:, :, None] - centroids[:, None]).square().min(2).values.sum(1)


def test_separated_clusters_are_found():
    centres = torch.tensor([-3.0, -1.0, 0.5, 4.0])
    x = (centres[torch.randint(0, 4, (5, 400))] + 0.01 * torch.randn(5, 400)).sort().values
    assert torch.allclose(kmeans_1d(x, 4), centres.expand(5, 4), atol=0.01)


def test_beats_uniform_levels_on_normal_data():
    x = torch.randn(6, 2000)
    levels = torch.linspace(0, 1, 16) * (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) + x.amin(1, keepdim=True)
    assert (error(x, kmeans_1d(x, 16)) < 0.75 * error(x, levels)).all()


def test_a_fit_is_a_fixed_point():
    """Every centroid is the mean of its members: Lloyd's condition."""
    x = torch.randn(3, 300)
    centroids = kmeans_1d(x, 8, iterations=500)
    nearest = (x[:, :, None] - centroids[:, None]).abs().argmin(2)
    for row in range(3):
        for k in range(8):
            assert torch.allclose(x[row][nearest[row] == k].mean(), centroids[row, k], atol=1e-4)


def test_fewer_values_than_clusters_and_constants():
    for x in (torch.zeros(2, 10), torch.tensor([[1.0, 2.0, 1.0, 2.0]])):
        centroids = kmeans_1d(x, 8)
        assert torch.isfinite(centroids).all()
        assert (centroids.diff(dim=1) >= 0).all()
    assert error(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), kmeans_1d(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), 8)).item() < 1e-6
