"""load_plain() and reset(buffers_only=True); what is refused is in the rows of the bad input."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from ignite_ema import EMAHandler, ModelAverage
from tests.helpers.bits import bits, contents, copied
from tests.helpers.models import Tied, compiled, move, net


@pytest.fixture
def pair():
    """An average, and another model of its kind, whose state can be loaded."""
    average, other = ModelAverage(Tied()), Tied()
    move(average.model)
    move(other)
    average.module.cache.fill_(7.0)
    return average, other


@pytest.mark.parametrize("wrap", [lambda model: model, DataParallel], ids=["plain", "of a wrapper"])
def test_a_plain_state_is_loaded_and_what_it_has_no_place_for_stays(wrap, pair):
    average, other = pair
    online = contents(average.model)
    average.load_plain(wrap(other).state_dict())
    due = {**contents(other), "cache": bits(torch.full((2,), 7.0))}
    assert contents(average.module) == due
    assert average.module.second.weight is average.module.first.weight
    assert contents(average.model) == online
    move(other)  # it is not tied to what was loaded
    assert contents(average.module) == due


def test_parameters_alone_leave_the_buffers_alone(pair):
    average, other = pair
    buffers = {name: bits(tensor) for name, tensor in average.module.named_buffers()}
    average.load_plain(dict(other.named_parameters()))
    parameters = {name: bits(tensor) for name, tensor in other.named_parameters()}
    assert contents(average.module) == {**parameters, **buffers}


@pytest.mark.parametrize("left_out", ["first.weight", "second.weight"])
def test_a_tied_weight_may_have_either_name_and_a_narrower_type(left_out, pair):
    average, other = pair
    state = copied(other.bfloat16().state_dict())
    del state[left_out]
    average.load_plain(state)
    assert torch.equal(average.module.second.weight, other.second.weight.float())


def test_tied_weights_that_are_nan_at_the_same_places_are_equal(pair):
    average, other = pair
    state = copied(other.state_dict())
    state["first.weight"][0, 0] = state["second.weight"][0, 0] = torch.nan
    average.load_plain(state)
    assert contents(average.module)["first.weight"] == bits(state["first.weight"])


@pytest.mark.parametrize("wrap", [DataParallel, compiled])
def test_the_names_are_those_of_the_model_without_wrappers(wrap):
    other = Tied()
    average = ModelAverage(wrap(Tied()))
    average.load_plain(copied(other.state_dict()))
    assert bits(average.averaged_tensors()["first.weight"]) == bits(other.first.weight)


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"note": "no tensor"}

    def set_extra_state(self, state):
        pass


def test_extra_state_is_no_weight():
    model = nn.Sequential(WithExtraState(1, 1), nn.Linear(1, 1))
    average = ModelAverage(model)
    move(model)
    average.load_plain(model.state_dict())
    assert contents(average.module) == contents(model)


@pytest.mark.parametrize("mode", ["copy", "update", "ema_train", {"1.*": "keep"}], ids=str)
def test_buffers_alone_can_be_reset(mode):
    handler = EMAHandler(net(), handle_buffers=mode)
    handler.num_updates = 7
    move(handler.model)
    weights = {name: bits(parameter) for name, parameter in handler.ema_model.named_parameters()}
    handler.reset(buffers_only=True)
    assert contents(handler.ema_model) == {**contents(handler.model), **weights}
    assert handler.num_updates == 7
    handler.reset()
    assert contents(handler.ema_model) == contents(handler.model)
    assert handler.num_updates == 0
