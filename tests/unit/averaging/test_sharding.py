"""What is not supported says so when the average is made."""

import warnings

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage


def test_a_parameter_of_zero_3_is_refused():
    model = nn.Linear(1, 1)
    model.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="'weight' is partitioned by DeepSpeed ZeRO-3; use its stage 1 or 2"):
        ModelAverage(model)


def test_fsdp1_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
        except Exception as error:  # it may want an accelerator
            pytest.skip(f"FullyShardedDataParallel cannot be made here: {error}")
    with pytest.raises(RuntimeError, match=r"got one with FullyShardedDataParallel \(FSDP1\).*; use fully_shard"):
        ModelAverage(model)
