"""What one rank skips, and whether the others know."""

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from ignite_ema import ModelAverage
from ignite_ema.averaging import rank_agreement
from tests.distributed.worker import mesh
from tests.helpers.bits import bits
from tests.helpers.worlds import run_world


def meets_a_bad_batch(folder, rank):
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    average = ModelAverage(model, "update", skip_nonfinite=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.module[1].running_mean.fill_(torch.nan if dist.get_rank() == rank else 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert average.update(0.5)
    assert average.module[1].running_mean.tolist() == [0.0 if dist.get_rank() == rank else 2.5] * 2
    return average.num_updates, [bits(parameter) for parameter in average.module.parameters()]


@pytest.mark.parametrize("rank", [0, 1])
def test_averaged_weights_stay_equal_where_the_statistics_of_one_rank_are_bad(tmp_path, rank):
    first, second = run_world(tmp_path, 2, meets_a_bad_batch, rank)
    assert first == second
    assert first[0] == 1


def sharded_pair(size):
    """Of a size of its own in each test: averages of one shape are told apart by their order on each rank."""
    return [fully_shard(nn.Linear(size, size), mesh=mesh()) for _ in range(2)]


def skips_on(folder, ranks):
    model, twin = sharded_pair(4)
    average = ModelAverage(model, ema_model=twin, skip_nonfinite=dist.get_rank() in ranks)
    dist.barrier()  # as a forward pass of a sharded model is one
    with pytest.raises(RuntimeError, match=f"got True on rank {ranks[0]}, but rank {1 - ranks[0]} leaves it out"):
        average.update(0.5)
    return average.num_updates


@pytest.mark.parametrize("rank", [0, 1])
def test_skipping_on_one_rank_of_a_sharded_model_is_refused_on_both(tmp_path, rank):
    assert run_world(tmp_path, 2, skips_on, [rank]) == [0, 0]


def is_made_on_one_rank(folder, skips):
    model, twin = sharded_pair(6 if skips else 8)
    if dist.get_rank() == 1:
        return "none"
    average = ModelAverage(model, ema_model=twin, skip_nonfinite=skips)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_agreement, "_PATIENCE", timedelta(seconds=0.2))
        try:
            return average.update(0.5)
        except RuntimeError as error:
            return str(error)


def test_an_average_on_one_rank_alone_waits_for_nobody(tmp_path):
    assert run_world(tmp_path, 2, is_made_on_one_rank, False) == [True, "none"]


def test_one_that_has_to_agree_says_who_is_missing(tmp_path):
    said, _ = run_world(tmp_path, 2, is_made_on_one_rank, True)
    assert "got True on rank 0, but rank 1 has made no average; make the average in the same way on all ranks" in said
