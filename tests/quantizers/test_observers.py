"""What observers keep of many batches."""

import pytest
import torch

from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.quantizers.observers import MinMaxObserver, MovingAverageObserver, SampleObserver


def observed(quantizer, batches):
    observer = quantizer.make_observer()
    for batch in batches:
        observer.update(quantizer.granularity.view(batch))
    quantizer.initialize_from(observer.summary())
    quantizer.initialized = True
    return quantizer


DATA = {"normal": torch.randn, "one-sided": lambda *shape: torch.randn(*shape).relu() + 0.01 * torch.rand(*shape)}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("kind", DATA)
def test_a_percentile_leaves_the_share_unclipped_that_was_asked_for(kind, percentile, symmetric):
    batches = [DATA[kind](512, 256) for _ in range(8)]
    options = {"granularity": "per_tensor", "symmetric": symmetric, "dynamic": False, "scale_dtype": "float32"}
    quantizer = observed(MinMaxQuantizer((256,), observer="percentile", percentile=percentile, **options), batches)
    x = torch.cat(batches)
    params = quantizer.qparams(x).for_view()
    v = x / params.scale + (0 if params.zero_point is None else params.zero_point)
    low, high = quantizer.format.range()
    clipped = 100 * ((v < low) | (v > high)).double().mean()
    # A zero point is an integer: one end of the two then lies a little further out.
    least = 0.35 if not symmetric else 0.85
    assert least * (100 - percentile) < clipped < 1.15 * (100 - percentile)


def test_samples_are_drawn_evenly_from_all_batches():
    """Whatever their sizes; and what is seldom stays seldom."""
    observer = SampleObserver(most=2000)
    sizes = [100, 50_000, 1, 9_000, 300]
    for batch, size in enumerate(sizes):
        observer.update(torch.full((1, size), float(batch)))
    samples = observer.summary()
    assert samples.shape == (1, 2000)
    shares = torch.stack([(samples == batch).sum() for batch in range(len(sizes))]) / 2000
    expected = torch.tensor(sizes) / sum(sizes)
    assert ((shares - expected).abs() < 4 * (expected / 2000).sqrt() + 1e-3).all()


def test_few_elements_are_all_kept():
    x = torch.randn(3, 500)
    observer = SampleObserver()
    for part in x.split(100, dim=1):
        observer.update(part)
    assert torch.equal(observer.summary().sort().values, x.sort().values)


@pytest.mark.parametrize("groups", [1, 64, 4096])
def test_memory_does_not_grow_with_batches(groups):
    observer = SampleObserver(most=2**20)
    for _ in range(4):
        observer.update(torch.randn(groups, 2**20 // groups))
    assert observer.summary().numel() <= 2**20


@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageObserver, SampleObserver])
def test_batches_without_elements_say_nothing(observer):
    x, with_gaps, without = torch.randn(2, 4, 50), observer(), observer()
    empty = torch.zeros(4, 0)
    with_gaps.update(empty)
    assert with_gaps.summary() is None
    for batch in x:
        with_gaps.update(batch)
        with_gaps.update(empty)
        without.update(batch)
    assert torch.equal(with_gaps.summary(), without.summary())


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_observers_notice_what_no_grid_holds(bad):
    x = torch.randn(1, 100_000)
    x[0, 77] = bad
    for observer in (MinMaxObserver(), MovingAverageObserver(), SampleObserver(most=300)):
        observer.update(torch.randn(1, 10))
        assert observer.finite
        observer.update(x)
        observer.update(torch.randn(1, 10))
        assert not observer.finite


@pytest.mark.parametrize("make", [LSQQuantizer, KMeansQuantizer])
def test_samples_are_enough_to_fit_to(make):
    batches = [torch.randn(64, 256) for _ in range(4)]
    x = torch.cat(batches)
    sampled, whole = make((256,), bits=4, granularity="per_tensor"), make((256,), bits=4, granularity="per_tensor")
    whole.initialize(x)
    errors = [(quantizer(x) - x).square().mean() for quantizer in (observed(sampled, batches), whole)]
    assert errors[0] < 1.05 * errors[1]
