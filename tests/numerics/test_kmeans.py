import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.errors import InputError
from qat.numerics.kmeans import equal_mass_1d, kmeans_1d, lloyd, moments_of, optimal_kmeans_1d
from qat.numerics.kmeans.histogram import bf16_rank, fit_histogram


def error(x, centroids, weights=None):
    squared = (x[:, :, None].double() - centroids[:, None].double()).square().min(2).values
    return (squared if weights is None else squared * weights).sum(1)


def least_error(values, clusters, weights):
    """The obvious dynamic program, over prefixes of one sorted row."""
    points = sorted(zip(values, weights, strict=True))

    def cost(i, j):
        heap = sum(w for _, w in points[i:j])
        mean = sum(w * v for v, w in points[i:j]) / heap if heap else 0.0
        return sum(w * (v - mean) ** 2 for v, w in points[i:j])

    best = [0.0] + [float("inf")] * len(points)
    for _ in range(clusters):
        best = [min(best[i] + cost(i, j) for i in range(j + 1)) for j in range(len(points) + 1)]
    return best[-1]


# Few distinct values, so that ties and fewer values than clusters occur; weights of zero too.
ROWS = st.lists(st.tuples(st.integers(-6, 6), st.integers(0, 3)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.integers(1, 6))
def test_the_optimum_is_that_of_the_obvious_program(row, clusters):
    values, weights = ([float(n) for n in column] for column in zip(*row, strict=True))
    if not any(weights):
        weights = [1.0] * len(weights)
    x, w = torch.tensor([values]), torch.tensor([weights])
    least = least_error(values, clusters, weights)
    for fit in (optimal_kmeans_1d, kmeans_1d, fit_histogram):
        centroids = fit(x, clusters, w)
        assert centroids.shape == (1, clusters)
        assert (centroids.diff(dim=1) >= 0).all()
        assert abs(error(x, centroids, w).item() - least) < 1e-4


@pytest.mark.parametrize("clusters", [2, 4, 8, 16])
def test_short_rows_get_the_optimum(clusters):
    x = torch.cat([torch.randn(20, 64), torch.distributions.StudentT(2.0).sample((20, 64))])
    assert torch.allclose(error(x, kmeans_1d(x, clusters)), error(x, optimal_kmeans_1d(x, clusters)), rtol=1e-4)


@pytest.mark.parametrize(("clusters", "mean_gap"), [(4, 0.002), (8, 0.005), (16, 0.008), (32, 0.004)])
def test_long_rows_come_close_to_the_optimum(clusters, mean_gap):
    x = torch.cat([torch.randn(10, 1000), torch.distributions.StudentT(3.0).sample((10, 1000))])
    gap = error(x, kmeans_1d(x, clusters)) / error(x, optimal_kmeans_1d(x, clusters)) - 1
    assert gap.min() > -1e-5
    assert gap.mean() < mean_gap


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize(("clusters", "n"), [(64, 400), (64, 1000), (256, 576)])
def test_many_clusters_come_close_to_the_optimum(clusters, n, weighted):
    """Normal and heavy-tailed rows; of 8 values a cluster and less, every one is searched."""
    x = torch.cat([torch.randn(1, n), torch.distributions.StudentT(4.0).sample((1, n))])
    weights = torch.randn(2, n).pow(4) if weighted else None
    found, least = (error(x, fit(x, clusters, weights), weights) for fit in (kmeans_1d, optimal_kmeans_1d))
    assert (found / least - 1).max() < 0.01


def hard_rows():
    """Rows that defeat bins of equal mass or of equal width."""
    normal = torch.randn(600)
    outlier = torch.cat([normal[1:], torch.tensor([1e4])])
    return {
        "an outlier": outlier,
        "mostly zeros": normal * (torch.rand(600) < 0.2),
        "half of it one value": torch.cat([torch.full((300,), 0.3), normal[:300]]),
        "many sizes": torch.exp(3 * normal),
        "few clusters for the bulk": torch.cat([0.01 * normal[:550], torch.linspace(10, 1000, 50)]),
    }


@pytest.mark.parametrize("name", hard_rows())
def test_no_shape_of_a_row_defeats_many_clusters(name):
    x = hard_rows()[name][None]
    found, least = (error(x, fit(x, 60)) for fit in (kmeans_1d, optimal_kmeans_1d))
    assert found < 1.03 * least


def test_clusters_that_all_cost_the_same():
    """No price tells 256 clusters of an even row from 200 or 300; Lloyd's algorithm splits what is left over."""
    x = torch.arange(600.0)[None]
    found, least = (error(x, fit(x, 256)) for fit in (kmeans_1d, optimal_kmeans_1d))
    assert found < 1.3 * least


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_the_histogram_of_bf16_values_loses_nothing(weighted):
    x = torch.randn(2, 3000).bfloat16()
    weights = torch.rand(2, 3000) if weighted else None
    direct, binned = optimal_kmeans_1d(x, 8, weights), fit_histogram(x, 8, weights)
    assert torch.allclose(direct, binned, rtol=1e-5, atol=1e-6)


def test_rows_longer_than_the_histogram_have_bins_are_fitted_through_it():
    x = torch.randn(1, 70_000)
    exact = optimal_kmeans_1d(x, 4)
    assert torch.allclose(error(x, kmeans_1d(x, 4)), error(x, exact), rtol=1e-4)
    assert torch.allclose(kmeans_1d(x, 4), exact, atol=0.01)


def test_the_rank_of_bf16_values_is_their_order():
    x = torch.tensor([-torch.inf, -3.0, -1e-30, 0.0, 1e-30, 2.0, torch.inf])
    ranks = bf16_rank(x)
    assert (ranks.diff() > 0).all()
    assert 0 <= ranks.min() <= ranks.max() < 2**16


def test_weights_pull_centroids():
    """What weighs a thousand times as much is met a lot better; weights of one everywhere change nothing."""
    x = torch.randn(8, 500)
    heavy = torch.where(x > 1, 1000.0, 1.0)
    fitted = kmeans_1d(x, 4, heavy)
    assert (error(x, fitted, heavy) < 0.3 * error(x, kmeans_1d(x, 4), heavy)).all()
    assert torch.allclose(kmeans_1d(x, 4, torch.ones_like(x)), kmeans_1d(x, 4), atol=1e-5)


def test_a_row_without_any_weight_is_weighted_evenly():
    x = torch.randn(2, 200)
    weights = torch.stack([torch.zeros(200), torch.rand(200)])
    fitted = kmeans_1d(x, 4, weights)
    assert torch.allclose(fitted[0], kmeans_1d(x, 4)[0], atol=1e-5)
    assert torch.equal(fit_histogram(x[:1], 4, weights[:1]), fit_histogram(x[:1], 4))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_size_of_the_values_makes_no_difference(scale):
    x = torch.randn(4, 300)
    x[0, 0] = 1e4
    assert torch.allclose(kmeans_1d(x * scale, 8) / scale, kmeans_1d(x, 8), rtol=1e-3, atol=1e-3)


def test_lloyd_ends_at_a_fixed_point():
    """Every centroid is the mean of its members."""
    x = torch.randn(3, 300)
    centroids = lloyd(moments_of(x), torch.linspace(-2, 2, 8).expand(3, -1), iterations=500)
    nearest = (x[:, :, None] - centroids[:, None]).abs().argmin(2)
    for row in range(3):
        for k in range(8):
            assert torch.allclose(x[row][nearest[row] == k].mean(), centroids[row, k], atol=1e-4)


def test_dead_centroids_move_to_where_the_error_is():
    x = torch.cat([torch.rand(2, 300), 10 + torch.rand(2, 300)], dim=1)
    start = torch.tensor([[0.5, 10.5, 10.5, 30.0], [-3.0, -3.0, 0.5, 10.5]])
    centroids = lloyd(moments_of(x), start)
    assert ((centroids < 1).sum(1) == 2).all()
    assert (error(x, centroids) < 0.3 * error(x, start)).all()
    flat = torch.ones(1, 50)
    assert error(flat, lloyd(moments_of(flat), torch.tensor([[1.0, 1.0, 2.0]]))) == 0


@pytest.mark.parametrize("clusters", [16, 32, 64, 256])
def test_rows_of_no_more_values_than_clusters_lose_nothing(clusters):
    x = torch.randn(3, clusters - 5) * 0.02
    for weights in (None, torch.rand(x.shape)):
        centroids = kmeans_1d(x, clusters, weights)
        assert centroids.shape == (3, clusters)
        assert error(x, centroids).max() == 0
    repeated = x[:, : clusters // 2].repeat(1, 7)
    assert error(repeated, kmeans_1d(repeated, clusters)).max() < 1e-12


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 10), torch.tensor([[1.0, 2.0, 1.0, 2.0]])], ids=["constant", "two values"]
)
@pytest.mark.parametrize("fit", [kmeans_1d, optimal_kmeans_1d, fit_histogram, equal_mass_1d])
def test_fewer_values_than_clusters(fit, x):
    centroids = fit(x, 8)
    assert (centroids.diff(dim=1) >= 0).all()
    assert error(x, centroids).max() < 1e-6


@pytest.mark.parametrize("entries", [3, 8, 16])
def test_cells_of_equal_mass(entries):
    x = torch.randn(5, 1600)
    table = equal_mass_1d(x, entries)
    counts = torch.stack([(x[:, :, None] - table[:, None]).abs().argmin(2).eq(k).sum(1) for k in range(entries)], 1)
    assert (table.diff(dim=1) > 0).all()
    assert (counts - 1600 / entries).abs().max() <= 2


def test_bad_weights_are_refused():
    x = torch.randn(2, 10)
    with pytest.raises(InputError, match=r"\[2, 9\] does not match \[2, 10\]"):
        kmeans_1d(x, 2, torch.rand(2, 9))
    with pytest.raises(InputError, match="negative values or NaN"):
        kmeans_1d(x, 2, -torch.rand(2, 10))


def test_bfloat16_rows_sort_by_their_bits():
    x = (torch.randn(5, 300) * 10 ** torch.linspace(-38, 38, 300)).bfloat16()
    x[:, ::7] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38], dtype=torch.bfloat16)[:, None]
    for found, expected in zip(moments_of(x), moments_of(x.float()), strict=True):
        assert torch.equal(found, expected)
