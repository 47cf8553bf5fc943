"""flatten=True: the same averages, from tensors that lie side by side and look as they did before."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage, PostHocEMA
from ignite_ema.averaging import flat
from tests.helpers.bits import wide


class Everything(nn.Module):
    """Tensors of many kinds, those that cannot be laid out among them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(2, 2)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.rand(5), requires_grad=False)
        self.narrow = nn.Parameter(torch.rand(7).bfloat16())
        self.scalar, self.empty = nn.Parameter(torch.rand(())), nn.Parameter(torch.zeros(0, 3))
        self.imaginary = nn.Parameter(torch.rand(3, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.rand(2, 3).T)
        self.eight = nn.Parameter(torch.rand(4).to(torch.float8_e4m3fn), requires_grad=False)
        storage = torch.rand(7)
        self.left, self.right = nn.Parameter(storage[:4]), nn.Parameter(storage[4:])
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("expanded", torch.rand(1).expand(3))
        self.register_buffer("flag", torch.tensor([True, False]), persistent=False)


def named(module):
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


@torch.no_grad()
def move(model, seed):
    torch.manual_seed(seed)
    for name, tensor in named(model).items():
        if name == "expanded":
            model.expanded = torch.rand(1).expand(3)
        elif tensor.is_complex():
            tensor.copy_(torch.rand(tensor.shape, dtype=tensor.dtype))
        elif tensor.is_floating_point() and name != "mask":
            tensor.copy_(torch.rand(tensor.shape))


def assert_close(one, other):
    for name, tensor in named(one).items():
        torch.testing.assert_close(wide(tensor), wide(named(other)[name]), rtol=1.3e-6, atol=1e-5, msg=name)


def both(model=Everything, seed=0, **options):
    """Two models alike, and the averages of them, of which the second is flat."""
    pairs = []
    for flatten in (False, True):
        torch.manual_seed(seed)
        made = model()
        pairs.append((made, ModelAverage(made, flatten=flatten, **options)))
    return zip(*pairs, strict=True)


OPTIONS = {
    "plain": {},
    "update": {"handle_buffers": "update"},
    "ema_train": {"handle_buffers": "ema_train"},
    "mapping": {"handle_buffers": {"norm.*": "update", "mask": "keep"}},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64, "handle_buffers": "update"},
    "share_frozen": {"share_frozen": True},
    "skip_nonfinite": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_updates_and_swaps_are_those_of_an_average_that_is_not_flat(option):
    models, averages = both(**OPTIONS[option])
    assert averages[1]._flat.blocks
    for k in range(4):
        for model, average in zip(models, averages, strict=True):
            move(model, k)
            assert average.update(0.3)
        assert_close(averages[1].module, averages[0].module)
        before = copy.deepcopy(models[1].state_dict())
        with averages[0].swapped(), averages[1].swapped():
            assert_close(*models)
        assert str(models[1].state_dict()) == str(before)
    for average in averages:
        average.reset()
    assert_close(averages[1].module, averages[0].module)


def test_each_tensor_keeps_its_identity_strides_and_a_storage_of_its_own():
    model = Everything()
    before = {name: (id(t), t.stride(), t.requires_grad, t.tolist()) for name, t in named(model).items()}
    average = ModelAverage(model, flatten=True)
    for module in (model, average.module):
        for block in average._flat.blocks:
            for tensor in (*block.online, *block.averaged):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
                assert tensor.data_ptr() % 64 == 0 or tensor.element_size() > 1
        strides = {name: t.stride() for name, t in named(module).items() if name != "expanded"}
        assert strides == {name: values[1] for name, values in before.items() if name != "expanded"}
    assert {name: (id(t), t.stride(), t.requires_grad, t.tolist()) for name, t in named(model).items()} == before
    laid_out = {id(t) for block in average._flat.blocks for t in block.online}
    apart = {name for name, t in named(model).items() if id(t) not in laid_out}
    assert apart == {"left", "right", "expanded", "empty"}


def test_files_copies_and_pickles_are_what_they_were():
    def saved(thing):
        file = io.BytesIO()
        torch.save(thing, file)
        return len(file.getvalue())

    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    before = saved(model[0].state_dict()), saved(model[0].weight)
    average = ModelAverage(model, flatten=True)
    assert (saved(model[0].state_dict()), saved(model[0].weight)) == before
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(twin, model)
    for other in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        move(other.model, 1)
        assert other.update(0.5)
        assert_close(average.module, model)


def test_a_model_that_is_laid_out_trains_as_before():
    models, averages = both(lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)))
    for model, average in zip(models, averages, strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(4, 3).cumsum(0)).square().mean().backward()
            optimizer.step()
            average.update(0.1)
    assert str(models[0].state_dict()) == str(models[1].state_dict())


# What moves a tensor out


def turn(model):
    model.first.weight.data = model.first.weight.data.T


def load_assigned(model):
    state = {name: t + 1 if t.element_size() > 1 else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.second.weight = model.first.weight


MOVES = {
    "double": nn.Module.double,
    "channels last": lambda model: model.conv.to(memory_format=torch.contiguous_format),
    "assign": load_assigned,
    "data": lambda model: setattr(model.first.weight, "data", torch.rand(3, 3)),
    "turned in place": turn,
    "another parameter": lambda model: setattr(model.conv, "weight", nn.Parameter(torch.rand(4, 3, 3, 3))),
    "another buffer": lambda model: setattr(model.norm, "running_mean", torch.rand(4)),
    "shared memory": nn.Module.share_memory,
}


@pytest.mark.parametrize("moved", [*MOVES, "the twin"])
def test_what_moves_a_tensor_out_is_noticed_at_the_next_update(moved):
    models, averages = both(handle_buffers="update")
    for model, average in zip(models, averages, strict=True):
        torch.manual_seed(1)
        model.expanded = torch.rand(3)
        average.update(0.5)
        MOVES.get(moved, load_assigned)(average.module if moved == "the twin" else model)
    for _ in range(2):
        for average in averages:
            average.update(0.5)
        assert_close(averages[1].module, averages[0].module)
        with averages[0].swapped(), averages[1].swapped():
            assert_close(*models)
        assert_close(*models)
    assert moved != "shared memory" or all(t.is_shared() for t in models[1].parameters())


def test_a_model_in_shared_memory_stays_there():
    model = nn.Linear(3, 3).share_memory()
    average = ModelAverage(model, flatten=True)
    assert model.weight.is_shared()
    assert average.update(0.5)


# Several averages of one model


def test_posthoc_averages_share_the_memory_of_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    streams = PostHocEMA(model, dirname=tmp_path, flatten=True).streams

    def places():
        return [[block.online_memory.data_ptr() for block in stream._average._flat.blocks] for stream in streams]

    assert places()[0] == places()[1]
    model[0].weight.data = torch.ones(3, 3)
    for _ in range(2):
        for stream in streams:
            stream._average.update(1.0)
            assert torch.equal(stream.ema_model[0].weight, torch.ones(3, 3))
    assert sorted(places()[0]) == sorted(places()[1])


def test_averages_of_other_options_do_not_move_the_model_to_and_fro():
    model = Everything()
    averages = [
        ModelAverage(model, flatten=True),
        ModelAverage(model, flatten=True, handle_buffers="ema_train"),
        ModelAverage(model.norm, flatten=True),
    ]
    where = []
    for _ in range(3):
        for average in averages:
            average.update(0.5)
        where.append({name: t.data_ptr() for name, t in named(model).items()})
    assert where[1] == where[0] == where[2]


# What autograd sees


@pytest.mark.parametrize("what", ["a swap", "an update of the twin"])
def test_autograd_notices_what_is_written_inside_a_graph(what):
    model = nn.Linear(2, 2)
    average = ModelAverage(model, flatten=True)
    x = torch.ones(1, 2, requires_grad=True)
    loss = (model if what == "a swap" else average.module)(x).square().sum()
    if what == "a swap":
        with average.swapped():
            pass
    else:
        average.update(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_in_a_swapped_block_is_warned_about():
    model = nn.Linear(2, 2)
    average = ModelAverage(model, flatten=True)
    with pytest.warns(UserWarning, match="'weight' was changed while"), average.swapped(), torch.no_grad():
        model.weight.add_(1.0)


# Options


@pytest.mark.parametrize("at", ["conv.weight", "narrow", "imaginary", "left"])
def test_skip_nonfinite_names_the_tensor(at):
    model = Everything()
    average = ModelAverage(model, flatten=True, skip_nonfinite=True)
    before = copy.deepcopy(average.module.state_dict())
    weight = dict(model.named_parameters())[at].data
    weight[(0,) * weight.ndim] = torch.nan
    with pytest.warns(UserWarning, match=f"'{at}' holds a NaN"):
        assert not average.update(0.5)
    assert str(average.module.state_dict()) == str(before)


def test_stochastic_rounding_moves_a_flat_average():
    model = nn.Linear(50, 50, bias=False).bfloat16()
    average = ModelAverage(model, flatten=True, stochastic_rounding=True)
    model.weight.data.fill_(1.0)
    average.module.weight.fill_(2.0)
    for _ in range(100):
        average.update(0.001)
    assert 1.88 < average.module.weight.float().mean().item() < 1.93


def test_one_block_at_a_time_is_laid_out(monkeypatch):
    monkeypatch.setattr(flat, "_BLOCK", 2000)
    model = nn.Sequential(*[nn.Linear(10, 10) for _ in range(20)])
    average = ModelAverage(model, flatten=True)
    assert len(average._flat.blocks) > 4
    assert max(block.online_memory.nbytes for block in average._flat.blocks) < 4000
    move(model, 0)
    average.update(1.0)
    assert_close(average.module, model)
