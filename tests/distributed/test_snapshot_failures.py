"""What goes wrong with snapshots on one rank is raised on all, within seconds and in one sentence."""

import errno
import os
from functools import partial

import pytest
import torch.distributed as dist

from ignite_ema import PostHocEMA
from ignite_ema.handlers import snapshots as module
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


def stands_elsewhere(folder, case, how):
    run = Run(case, folder / "snapshots").train(3)
    state = run.ema.state_dict()
    if dist.get_rank() == 1:
        if how == "updates":
            for average in run.ema.streams:
                average.num_updates = 2
        elif how == "snapshots":
            run.ema.load_state_dict({**state, "snapshot_times": []})
        else:
            run.ema.load_state_dict({**state, "run_id": "another"})
    with pytest.raises(RuntimeError, match="should stand at one point on all ranks, got .* on rank 0 and .* on rank 1"):
        run.ema.save()
    return True


@cases
@pytest.mark.parametrize("how", ["updates", "snapshots", "run"])
def test_ranks_that_stand_at_different_points_are_told(how, case, world, tmp_path):
    assert world(stands_elsewhere, case, how) == [True, True]
    assert [one.time for one in stored(tmp_path / "snapshots")] == [2]


def loads_on_one_rank(folder):
    state = Run("plain", folder / "snapshots").train(3).ema.state_dict()
    run = Run("plain", folder / "snapshots")
    run.trainer.logger.disabled = True
    if dist.get_rank() == 0:
        run.ema.load_state_dict(state)
    with pytest.raises(RuntimeError, match="let all load the same state and make the same updates"):
        run.train()
    return run.ema.num_updates


def test_a_state_that_one_rank_alone_loads_is_told_before_training(world):
    assert world(loads_on_one_rank) == [3, 0]


def has_no_folder(folder):
    (folder / "file").touch()
    with pytest.raises(OSError, match="file"):
        PostHocEMA(Net(), dirname=folder / "file")
    return True


def test_a_folder_that_cannot_be_made_is_told_on_all_ranks(world):
    assert world(has_no_folder) == [True, True]
