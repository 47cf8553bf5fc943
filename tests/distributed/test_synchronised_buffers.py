"""Buffers of one rank for all, expanded ones too, and whole averages on one; what does not fit is told beforehand."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from ignite_ema import EMAHandler
from ignite_ema.distributed import gathered_state_dict, sync_buffers
from tests.distributed.worker import mesh
from tests.helpers.models import module


def synchronises(folder):
    """Buffers that a broadcast does not take as they are, and one that is sharded."""
    rank = float(dist.get_rank())
    column = torch.tensor([[rank], [rank + 10]])
    sharded = distribute_tensor(torch.arange(4.0), mesh(), [Shard(0)])
    before = sharded.to_local().clone()
    model = module(
        weight=nn.Parameter(torch.full((2,), rank)),
        expanded=column.expand(2, 3),
        transposed=torch.full((2, 3), rank).t(),
        count=torch.tensor(dist.get_rank()),
        mask=torch.tensor([rank == 1, True]),
        narrow=torch.full((2,), rank, dtype=torch.bfloat16),
        empty=torch.empty(0),
        sharded=sharded,
    )
    model.register_buffer("unsaved", torch.tensor(rank), persistent=False)
    sync_buffers(model, source=1)
    got = {name: buffer.tolist() for name, buffer in model.named_buffers() if name != "sharded"}
    assert got == {
        "expanded": [[1.0] * 3, [11.0] * 3],
        "transposed": [[1.0] * 2] * 3,
        "count": 1,
        "mask": [True, True],
        "narrow": [1.0] * 2,
        "empty": [],
        "unsaved": 1.0,
    }
    assert model.expanded.stride() == (1, 0)
    assert column.tolist() == [[1.0], [11.0]]
    assert torch.equal(sharded.to_local(), before)
    assert model.weight.tolist() == [rank] * 2


def test_buffers_of_any_kind_are_synchronised_and_stay_expanded(world):
    world(2, synchronises)


def is_refused(folder, what):
    rank = dist.get_rank()
    second = torch.zeros(3 + (rank if what == "shape" else 0))
    model = module(first=torch.full((2,), float(rank)), **({} if what == "name" and rank else {"second": second}))
    source = {"source": rank, "no rank": 2}.get(what, 0)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared outside)
        sync_buffers(model, source)
    assert model.first.tolist() == [float(rank)] * 2
    return str(raised.value)


REFUSALS = {
    "shape": "got 'second' (torch.float32, (3,)) on rank 0 and (torch.float32, (4,)) on rank 1; ",
    "name": "got 'second' (torch.float32, (3,)) on rank 0 and nothing on rank 1; ",
    "source": "got 'source (the argument)' 0 on rank 0 and 1 on rank 1; ",
    "no rank": "source should be a rank from 0 to 1, got 2.",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_buffers_that_do_not_fit_are_refused_on_all_ranks(world, what):
    first, second = world(2, is_refused, what)
    assert first == second
    assert REFUSALS[what] in first


def adapted():
    """A frozen layer with a tied name, and what trains beside it."""
    base = nn.Linear(4, 4).requires_grad_(False)
    return nn.ModuleDict({"base": base, "again": base, "norm": nn.BatchNorm1d(4)})


@pytest.mark.usefixtures("process_group")
def test_the_whole_average_has_the_frozen_parameters_that_it_shares():
    model = adapted()
    handler = EMAHandler(model, share_frozen=True)
    nn.init.constant_(handler.ema_model["norm"].weight, 0.5)
    state = gathered_state_dict(handler)
    plain = adapted()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain["base"].weight, model["base"].weight)
    assert state["base.weight"] is state["again.weight"]
    assert state["base.weight"].data_ptr() != model["base"].weight.data_ptr()
    assert plain["norm"].weight.tolist() == [0.5] * 4


def test_one_process_without_a_group_gathers_its_average_and_has_nothing_to_synchronise():
    handler = EMAHandler(nn.BatchNorm1d(2))
    sync_buffers(handler.model)
    assert gathered_state_dict(handler).keys() == handler.model.state_dict().keys()


def gathers_others(folder):
    handler = EMAHandler(nn.Linear(2 + dist.get_rank(), 1))
    with pytest.raises(ValueError, match=r"same tensors on all ranks, got 'weight' .*1, 2\)\) on rank 0 and .*1, 3\)"):
        gathered_state_dict(handler)


def test_averages_that_differ_are_not_gathered(world):
    world(2, gathers_others)
