"""A directory of snapshots, for the tests of what is made of them."""

import shutil

import pytest

from ignite_ema.posthoc import snapshots
from tests.helpers.snapshots import make_snapshot


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for time in range(1, 65):
        snapshots.write(make_snapshot(time), folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """64 snapshots, each of which holds its own time."""
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)
