"""Under DDP a bad batch of one rank changes nothing that is equal on all."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ignite_ema import ModelAverage
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
