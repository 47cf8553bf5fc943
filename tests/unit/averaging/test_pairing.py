"""Which tensor is averaged into which: every shape and memory, read afresh at each update."""

import copy

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.bits import copied, storages, tensors
from tests.helpers.models import compiled, constant, module

# Shapes and memory.


@pytest.mark.parametrize("mode", ["copy", "update"])
def test_expanded_and_strided_buffers(mode):
    grid = torch.arange(24.0).reshape(4, 6)
    model = module(
        expanded=torch.ones(3, 1).expand(3, 4),
        transposed=grid.T,
        every_other=grid[:, ::2],
        windows=torch.arange(5.0).unfold(0, 3, 1),
        channels_last=torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last),
    )
    average = ModelAverage(model, mode)
    before = copied(tensors(model))
    for name, tensor in before.items():
        setattr(model, name, (tensor + 2).as_strided(tensor.shape, tensor.stride()))
    average.update(0.5)
    for name, tensor in tensors(average.module).items():
        assert torch.equal(tensor, before[name] + (2 if mode == "copy" else 1))
    assert average.module.channels_last.is_contiguous(memory_format=torch.channels_last)
    assert set(storages(model).values()).isdisjoint(storages(average.module).values())


def overlapping():
    """Two buffers, of which one is a part of the other."""
    table = torch.zeros(4)
    return module(table=table, tail=table[2:])


@pytest.mark.parametrize("twin", [None, overlapping], ids=["copied", "brought"])
@pytest.mark.parametrize(("mode", "due"), [("copy", 4.0), ("update", 1.0)])
def test_overlapping_views_are_averaged_once(mode, due, twin):
    model = overlapping()
    average = ModelAverage(model, mode, ema_model=twin and twin())
    model.table.fill_(4.0)
    average.update(0.25)
    assert average.module.table.tolist() == [due] * 4
    assert average.module.tail.tolist() == [due] * 2


# Rebinding: tensors are read afresh at each update.


def compile_later(model):
    nn.init.constant_(model[0].weight, 4.0)
    model[0] = compiled(model[0])


REPLACED = {
    "assigned": lambda model: model.load_state_dict({"0.weight": torch.tensor([[4.0]])}, assign=True),
    "memory": lambda model: setattr(model[0].weight, "data", torch.tensor([[4.0]])),
    "parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.tensor([[4.0]]))),
    "submodule": lambda model: model.__setitem__(0, constant(4.0)),
    "compiled submodule": compile_later,
}


@pytest.mark.parametrize("how", REPLACED)
def test_what_is_replaced_is_followed(how):
    model = nn.Sequential(constant())
    average = ModelAverage(model)
    average.update(0.5)
    REPLACED[how](model)
    average.update(0.25)
    assert average.module[0].weight.item() == 1.0
    nn.init.constant_(model[0].weight, 9.0)
    average.update(0.25)
    assert average.module[0].weight.item() == 3.0


def test_a_parameter_that_became_a_buffer_is_named_and_nothing_changes():
    model = nn.Linear(1, 1)
    average = ModelAverage(model)
    before, weight = copied(tensors(average.module)), model.weight.detach()
    del model.weight
    model.register_buffer("weight", weight + 1)
    with pytest.raises(
        RuntimeError, match="'weight' is a parameter in one of model and twin, and a buffer in the other"
    ):
        average.update(0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(average.module).items())


def test_loading_never_ties_the_average_to_what_was_loaded():
    model = nn.BatchNorm1d(2)
    average, other = ModelAverage(model), ModelAverage(model)
    for load in (
        lambda: other.load_averaged(average.averaged_tensors()),
        lambda: other.load_state_dict(average.state_dict()),
        other.reset,
    ):
        load()
        for source in (model, average.module):
            assert set(storages(other.module).values()).isdisjoint(storages(source).values())


# Copied and kept buffers may change their shape, as position tables do that grow with the longest sequence.


class Growing(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.arange(2.0), persistent)

    def forward(self, x):
        if len(x) > len(self.table):
            self.table = torch.arange(float(len(x)))
        return x * self.scale + self.table[: len(x)]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("mode", ["copy", "statistics", "ema_train", {"table": "keep"}])
def test_a_buffer_that_grows_is_followed(mode, persistent):
    model = Growing(persistent)
    average = ModelAverage(model, mode)
    follows = mode in ("copy", "statistics")
    for length in (5, 3, 7):
        model(torch.ones(length))
        assert average.update(0.5)
        assert len(average.module.table) == (len(model.table) if follows else 2)
        with average.swapped():
            assert torch.equal(model(torch.ones(9)), average.module(torch.ones(9)))
            average.module.table = average.module.table[:2]
        assert len(model.table) == max(length, 5)
    resumed = ModelAverage(Growing(persistent), mode)
    average.update(0.5)
    resumed.load_state_dict(average.state_dict())
    assert len(resumed.module.table) == (len(average.module.table) if persistent else 2)
    average.reset()
    assert torch.equal(average.module.table, model.table)
    average.module(torch.ones(20))  # the twin's own grows too
    assert average.update(0.5)
    assert len(average.module.table) == (7 if follows else 20)


def test_a_buffer_that_is_averaged_keeps_its_shape():
    model = Growing(True)
    average = ModelAverage(model, "update")
    model(torch.ones(5))
    for action in (lambda: average.update(0.5), average.reset, average.swapped().__enter__):
        with pytest.raises(RuntimeError, match=r"'table' has shape \(5,\) in the model and .*\(2,\) in the twin"):
            action()


def test_a_weight_that_is_not_dense_is_averaged_apart_from_the_others():
    """On a GPU one such tensor sends a whole list another, slower way."""
    model = nn.Module()
    model.plain, model.strided = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(4, 2)[::2])
    average = ModelAverage(model, ema_model=copy.deepcopy(model))
    assert [[slot.name for slot in group.slots] for group in average._pairing.groups] == [["plain"], ["strided"]]
