"""What goes wrong with snapshots on one rank is raised on all, within seconds and in one sentence."""

import errno
import os
from functools import partial

import pytest
import torch.distributed as dist

from ignite_ema import PostHocEMA
from ignite_ema.handlers import posthoc as module
from ignite_ema.posthoc import stored
from tests.distributed.test_snapshots import Run
from tests.distributed.worker import Net
from tests.helpers.worlds import run_world

cases = pytest.mark.parametrize("case", ["DDP", "FSDP2"])


@pytest.fixture
def world(tmp_path):
    return partial(run_world, tmp_path, 2)


def cannot_write(folder, case):
    run = Run(case, folder / "snapshots")
    run.train(3)
    write = module.write

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module.write = fail
    try:
        with pytest.raises(OSError, match="No space left on device"):
            run.ema.save()
    finally:
        module.write = write
    assert run.ema.state_dict()["snapshot_times"] == [2]
    assert (run.ema.save() is None) == (dist.get_rank() > 0)  # when there is space again
    return run.ema.state_dict()["snapshot_times"]


@cases
def test_a_snapshot_that_cannot_be_written_is_told_on_all_ranks(case, world, tmp_path):
    assert world(cannot_write, case) == [[2, 3]] * 2
    assert [one.time for one in stored(tmp_path / "snapshots")] == [2, 3]


def has_no_folder(folder):
    (folder / "file").touch()
    with pytest.raises(OSError, match="file"):
        PostHocEMA(Net(), dirname=folder / "file")
    return True


def test_a_folder_that_cannot_be_made_is_told_on_all_ranks(world):
    assert world(has_no_folder) == [True, True]
