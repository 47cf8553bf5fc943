"""A world of worker processes reports what happens on each rank, and goes on after it."""

import os
import signal
import time

import pytest
import torch.distributed as dist

from tests.helpers.worlds import outcomes, run_world


def my_process(folder=None):
    return dist.get_rank(), os.getpid()


def ends(how):
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raises":
            raise ValueError("a reason")
        elif how == "late":
            time.sleep(30)
    return "done"


def test_the_same_processes_serve_one_scenario_after_the_other(tmp_path):
    first = run_world(tmp_path, 2, my_process)
    assert first == run_world(tmp_path, 2, my_process)
    assert [rank for rank, _ in first] == [0, 1]


@pytest.mark.parametrize(("how", "error"), [("killed", "exit code -9"), ("raises", "a reason"), ("late", "within 2 s")])
def test_a_failure_of_one_rank_is_told_and_the_world_starts_again(tmp_path, how, error):
    before = run_world(tmp_path, 2, my_process)
    good, bad = outcomes(2, ends, how, timeout=2 if how == "late" else 60)
    assert (good.result, good.error) == ("done", None)
    assert error in bad.error
    assert run_world(tmp_path, 2, my_process) != before
