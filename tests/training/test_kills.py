"""A small portion of the kill matrix: python tests/kills.py runs all of it."""

import kills
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("job", ["pdu", "evaluate", "grad_diff, ddp on 2"])
def test_a_killed_run_ends_the_same(job):
    assert kills.main(["--kills", "2", "--jobs", job, "--seed", "7", "--no-results"])
