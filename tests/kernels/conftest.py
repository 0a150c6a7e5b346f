"""Kernels are chosen as where nothing was tuned, whatever this machine was tuned to."""

import pytest

from qat.kernels.quantized_linear import tuned


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch, tmp_path):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path))
    tuned.tuned_on.cache_clear()
    yield
    tuned.tuned_on.cache_clear()
