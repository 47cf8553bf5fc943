"""A directory of snapshots, for the tests of what is made of them."""

import shutil

import pytest
import torch

from ignite_ema.posthoc import snapshots
from tests.helpers.snapshots import make_snapshot


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other on a busy machine take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
