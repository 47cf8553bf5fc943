"""What is not supported says so when the average is made."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from ignite_ema import ModelAverage


def test_fsdp1_is_refused(process_group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))
        except Exception as error:  # it may want an accelerator
            pytest.skip(f"FullyShardedDataParallel cannot be made here: {error}")
    with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel \(FSDP1\).*Use fully_shard"):
        ModelAverage(model)


def test_a_sharded_model_brings_its_twin(process_group):
    mesh = init_device_mesh("cpu", (1,))
    model, twin = (fully_shard(nn.Linear(2, 2), mesh=mesh) for _ in range(2))
    with pytest.raises(RuntimeError, match="sharded as the model is, got None.*pass it as ema_model="):
        ModelAverage(model)
    assert ModelAverage(model, ema_model=twin).update(0.5)
