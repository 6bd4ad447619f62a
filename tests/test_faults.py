"""A handful of the faults of faults.py; the whole list: python tests/faults.py."""

import pytest
from faults import all_of

pytestmark = pytest.mark.slow
SOME = ("kill -9 of rank 1", "SIGTERM", "out of memory on rank 1", "folder removed", "disk full")


def test_nothing_is_lost_and_nothing_hangs(tmp_path):
    rows = all_of(len(SOME), 1, tmp_path, lambda fault: fault.name in SOME)
    assert [row[-1] for row in rows] == ["whole, the same bytes"] * len(SOME), rows
