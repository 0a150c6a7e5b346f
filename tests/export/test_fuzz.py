"""A few mutated files of every target; `python -m tests.export.fuzz` tries ten thousand."""

import pytest

from tests.export.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_export_is_read_or_refused(name, tmp_path):
    found = fuzz(name, 50, seed=1, work=tmp_path)
    assert found["refused"] > 10
    assert found["read"] > 5  # or nothing but the first check would be tried
