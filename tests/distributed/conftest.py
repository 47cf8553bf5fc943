"""What several of the distributed tests need."""

from functools import partial

import pytest

from tests.helpers.worlds import run_world


@pytest.fixture
def world(tmp_path):
    """Runs a scenario on all ranks of a world, and returns what it returns on each."""
    return partial(run_world, tmp_path)
