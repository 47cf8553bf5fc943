"""Buffers of one rank for all, expanded ones too, and whole averages on one; what does not fit is told beforehand."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from ignite_ema import EMAHandler
from ignite_ema.distributed import gathered_state_dict, sync_buffers
from tests.distributed.worker import mesh
from tests.helpers.worlds import run_world


def holder(*buffers):
    module = nn.Module()
    for index, buffer in enumerate(buffers):
        module.register_buffer(f"buffer{index}", buffer)
    return module


def synchronises(folder):
    """Buffers that a broadcast does not take as they are, and one that is sharded."""
    rank = float(dist.get_rank())
    column, scalar = torch.tensor([[rank], [rank + 10]]), torch.tensor(rank)
    sharded = distribute_tensor(torch.arange(4.0), mesh(), [Shard(0)])
    before = sharded.to_local().clone()
    module = holder(
        *(column.expand(2, 3), scalar.expand(4), torch.full((2, 3), rank).t(), torch.tensor(dist.get_rank())),
        *(torch.tensor([rank == 1, True]), torch.full((2,), rank, dtype=torch.bfloat16), torch.empty(0), sharded),
    )
    module.weight = nn.Parameter(torch.full((2,), rank))
    module.register_buffer("unsaved", torch.tensor(rank), persistent=False)
    sync_buffers(module, source=1)
    due = [[[1.0] * 3, [11.0] * 3], [1.0] * 4, [[1.0] * 2] * 3, 1, [True, True], [1.0] * 2, []]
    assert [getattr(module, f"buffer{index}").tolist() for index in range(7)] == due
    assert module.unsaved.item() == 1
    assert module.buffer0.stride() == (1, 0)
    assert column.tolist() == [[1.0], [11.0]]
    assert torch.equal(sharded.to_local(), before)
    assert module.weight.tolist() == [rank] * 2


def test_buffers_of_any_kind_are_synchronised_and_stay_expanded(world):
    world(2, synchronises)


def test_one_process_has_nothing_to_synchronise():
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(3)
    sync_buffers(norm)
    assert norm.running_mean.tolist() == [3, 3]


def is_refused(folder, what):
    other = dist.get_rank() == 1
    first = torch.full((2,), float(dist.get_rank()))
    second, source = torch.zeros(3), 0
    if what == "shape" and other:
        second = torch.zeros(4)
    elif what == "name" and other:
        second = None
    elif what == "source":
        source = 1 if other else 0
    elif what == "no rank":
        source = 2
    module = holder(first) if second is None else holder(first, second)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared outside)
        sync_buffers(module, source)
    assert module.buffer0.tolist() == [float(dist.get_rank())] * 2
    return str(raised.value)


REFUSALS = {
    "shape": "got 'buffer1' (torch.float32, (3,)) on rank 0 and (torch.float32, (4,)) on rank 1; ",
    "name": "got 'buffer1' on rank 0 and not on rank 1; ",
    "source": "got 'source' 0 on rank 0 and 1 on rank 1; ",
    "no rank": "source should be a rank from 0 to 1, got 2.",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_buffers_that_do_not_fit_are_refused_on_all_ranks(tmp_path, what):
    first, second = run_world(tmp_path, 2, is_refused, what)
    assert first == second
    assert REFUSALS[what] in first


class Adapted(nn.Module):
    """A frozen layer with a tied name, and what trains beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.again = self.base
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.base(x))


def test_the_whole_average_has_the_frozen_parameters_that_it_shares():
    model = Adapted()
    handler = EMAHandler(model, share_frozen=True)
    nn.init.constant_(handler.ema_model.norm.weight, 0.5)
    state = gathered_state_dict(handler)
    plain = Adapted()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.base.weight, model.base.weight)
    assert state["base.weight"] is state["again.weight"]
    assert state["base.weight"].data_ptr() != model.base.weight.data_ptr()
    assert plain.norm.weight.tolist() == [0.5] * 4


@pytest.mark.usefixtures("process_group")
def test_so_it_has_in_a_group():
    test_the_whole_average_has_the_frozen_parameters_that_it_shares()


def gathers_others(folder):
    handler = EMAHandler(nn.Linear(2 + dist.get_rank(), 1))
    with pytest.raises(ValueError, match=r"same tensors on all ranks, got 'weight' \(1, 2\) on rank 0 and \(1, 3\) on"):
        gathered_state_dict(handler)


def test_averages_that_differ_are_not_gathered(tmp_path):
    run_world(tmp_path, 2, gathers_others)
