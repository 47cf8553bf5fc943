"""What several of the distributed tests need."""

from functools import partial

import pytest

from tests.helpers.worlds import close_worlds, run_world


@pytest.fixture
def world(tmp_path):
    """Runs a scenario on all ranks of a world, and returns what it returns on each."""
    return partial(run_world, tmp_path)


@pytest.fixture(scope="module", autouse=True)
def worlds_of_this_file():
    """What the tests of one file do to torch's threads and memory is not met by those of another."""
    yield
    close_worlds()
