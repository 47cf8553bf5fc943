"""share_frozen: the twin holds what trains and shares the rest."""

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.bits import contents, copied, tensors
from tests.helpers.models import frozen, move


class Adapted(nn.Module):
    """A frozen linear layer, and what trains beside it, as LoRA has it."""

    def __init__(self, width=4, rank=2, base=torch.float32):
        super().__init__()
        self.base = nn.Linear(width, width).to(base).requires_grad_(False)
        self.down = nn.Parameter(torch.rand(rank, width))
        self.up = nn.Parameter(torch.rand(width, rank))
        self.norm = nn.BatchNorm1d(width)


FROZEN = ["base.weight", "base.bias"]
HELD = ["down", "up", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def sharing(model, *arguments, **options):
    average = ModelAverage(model, *arguments, share_frozen=True, **options)
    move(model)
    average.update(0.25)
    move(model)
    return average


@pytest.fixture
def pair():
    """A model, and an average that shares with it."""
    model = Adapted()
    return model, sharing(model)


def shared_names(model, twin):
    theirs = dict(twin.named_parameters())
    return [name for name, parameter in model.named_parameters() if theirs[name] is parameter]


def bytes_of(tensors):
    """The memory of tensors, each storage once and whole."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_the_twin_takes_the_bytes_of_what_trains_and_of_the_buffers(dtype):
    model = Adapted(width=64, base=torch.bfloat16)
    twin = sharing(model, dtype=dtype).module
    assert shared_names(model, twin) == FROZEN
    assert twin.base.weight.dtype is torch.bfloat16
    assert {twin.up.dtype, twin.norm.running_mean.dtype} == {dtype or torch.float32}
    own = [tensor for name, tensor in tensors(twin).items() if name not in FROZEN]
    wider = 1 if dtype is None else 2
    assert bytes_of(own) == (2 * 2 * 64 + 4 * 64) * 4 * wider + 8  # two adapters, four tensors and a count of the norm
    theirs = tensors(model).values()
    assert bytes_of([*theirs, *tensors(twin).values()]) == bytes_of(theirs) + bytes_of(own)


def test_a_model_that_is_frozen_throughout_can_be_averaged():
    model = nn.Linear(2, 2).requires_grad_(False)
    average = ModelAverage(model, share_frozen=True, skip_nonfinite=True)
    model.weight.fill_(torch.nan)  # of no concern: it is not averaged
    assert average.update(0.5)
    average.reset()
    with average.swapped():
        assert average.averaged_tensors() == {}


def test_the_state_holds_what_is_held_and_nothing_else():
    state = ModelAverage(Adapted(), share_frozen=True).state_dict()
    assert list(state["averaged_tensors"]) == HELD
    assert set(state["state_dict_names"]) == {*FROZEN, *HELD}


def test_a_base_that_is_frozen_no_more_raises_each_time_and_changes_nothing(pair):
    model, average = pair
    before = contents(average.module)
    model.base.bias.requires_grad_(True)
    for action in (*[lambda: average.update(0.5)] * 2, average.reset, average.swapped().__enter__):
        with pytest.raises(RuntimeError, match="'base.bias' was frozen and is shared"):
            action()
    assert contents(average.module) == before
    model.base.bias.requires_grad_(False)
    assert average.update(0.5)


def test_tied_frozen_parameters_stay_tied_and_are_followed_together():
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model.embedding.requires_grad_(False)
    model.head.weight = model.embedding.weight
    average = sharing(model)
    assert list(average.averaged_tensors()) == ["head.bias"]
    for _ in range(2):
        assert average.module.head.weight is average.module.embedding.weight is model.embedding.weight
        model.embedding.weight = model.head.weight = frozen(torch.zeros(3, 2))
        assert average.update(0.5)
    average.load_averaged(copied(model.state_dict()))
    assert contents(average.module) == contents(model)
    with pytest.raises(ValueError, match="'head.weight' is frozen and shared"):
        average.load_averaged(copied(model.state_dict()) | {"head.weight": torch.ones(3, 2)})


@pytest.mark.parametrize("base", ["as it is", "in float64", "in bfloat16", "left out"])
def test_a_shared_base_may_be_in_a_plain_state_if_it_is_equal(base, pair):
    model, average = pair
    state, before = copied(model.state_dict()), contents(model)
    if base == "left out":
        for name in FROZEN:
            del state[name]
    elif base != "as it is":
        state["base.weight"] = model.base.weight.to(getattr(torch, base.removeprefix("in ")))
    average.load_averaged(state)
    assert contents(average.module) == contents(model) == before
    assert shared_names(model, average.module) == FROZEN
