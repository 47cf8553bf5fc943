"""ModelAverage: its momentum, its counts, its copies, and modules that are unlike most."""

import copy
import math
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

from ignite_ema import EMAWarning, ModelAverage, schedules
from tests.helpers.averages import made, moving
from tests.helpers.models import constant


def two_layers():
    return nn.Sequential(constant(), constant())


def test_a_tensor_that_both_would_own_raises_and_changes_nothing():
    model = two_layers()
    twin = copy.deepcopy(model)
    twin[1].weight = model[1].weight
    with pytest.raises(RuntimeError, match="'1.weight' is one and the same tensor in the model and in the twin"):
        ModelAverage(model, ema_model=twin)
    assert model[1].weight.requires_grad
    average = ModelAverage(model)
    average.module[0].weight = model[0].weight
    with pytest.raises(RuntimeError, match="'0.weight' is one and the same tensor"):
        average.update(0.5)


def test_a_pattern_that_matches_nothing_raises_before_the_twin_is_touched():
    twin = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="got 'mean'"):
        ModelAverage(nn.BatchNorm1d(2), {"mean": "keep"}, ema_model=twin)
    assert twin.training
    assert twin.weight.requires_grad


# Momentum, counts, share.


SCHEDULES = {
    "linear": schedules.LinearWarmup(0.01, 0.5, 7),
    "function": lambda n: 0.5 / (n + 1),
}


def test_a_torchscript_module_is_averaged():
    model = torch.jit.script(constant(1.0))
    average = ModelAverage(model)
    model.weight.data.fill_(3.0)
    average.update(0.5)
    assert (average.module.weight.item(), model.weight.item()) == (2.0, 3.0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_update_without_a_momentum_follows_the_schedule(schedule):
    by_itself, by_hand, share = moving(made(schedule), 12), made(None), 1.0
    for n in range(12):
        for parameter in by_hand.model.parameters():
            parameter.data.add_(1)
        assert by_hand.update(schedule(by_hand.num_updates))
        share *= 1 - schedule(n)
    assert torch.equal(by_itself.module.weight, by_hand.module.weight)
    assert by_itself.initial_share == by_hand.initial_share == share


def test_what_counts_as_an_update_and_what_is_left_of_the_start():
    average = made(skip_nonfinite=True)
    assert (average.num_updates, average.initial_share) == (0, 1.0)
    moving(average, 1)
    average.momentum = 0.5
    assert moving(average, 1).momentum == 0.5
    weight, bias = average.model.weight.detach().clone(), average.model.bias
    average.model.weight.data.fill_(torch.nan)
    with pytest.warns(EMAWarning, match="holds a NaN"):
        average.update()
    average.model.weight.data.copy_(weight)
    average.model.bias = None
    with pytest.raises(RuntimeError, match="should keep the structure"):
        average.update()
    average.model.bias = bias
    average.reset(buffers_only=True)
    assert (average.num_updates, average.num_skipped, average.initial_share) == (2, 1, 0.75 * 0.5)
    average.load_averaged(nn.Linear(2, 2).state_dict())  # from elsewhere: not the start
    assert average.initial_share == 0.0
    average.reset()
    assert (average.num_updates, average.initial_share) == (0, 1.0)
    average.num_updates = 5
    assert math.isnan(average.initial_share)  # nobody knows


@pytest.mark.parametrize(("momentum", "warned"), [(0.9, True), (0.89, False), (1.0, False)])
def test_a_decay_is_warned_about(momentum, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ModelAverage(nn.Linear(1, 1), momentum=momentum)
    assert ["nearly copies them" in str(one.message) for one in caught] == [True] * warned
    if sys.version_info >= (3, 12):
        assert [one.filename for one in caught] == [__file__] * warned


# Copies and repr.


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda average: pickle.loads(pickle.dumps(average))}


@pytest.mark.parametrize("options", [{"share_frozen": True}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_its_own_way_from_the_same_place(way, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    model[0].bias.requires_grad_(False)
    average = moving(ModelAverage(model, "update", momentum=0.25, **options), 3)
    other = WAYS[way](average)
    assert (other.num_updates, other.initial_share) == (3, average.initial_share)
    assert (other.module[0].bias is other.model[0].bias) == bool(options.get("share_frozen"))
    before = average.module[0].weight.clone()
    for one in (average.model, other.model):
        one[0].weight.data.fill_(8)
    other.update()
    assert torch.equal(average.module[0].weight, before)
    average.update()
    assert torch.equal(average.module[0].weight, other.module[0].weight)
    with other.swapped():
        assert torch.equal(other.model[0].weight, other.module[0].weight)
        assert (average.model[0].weight == 8).all()


REPRS = [
    (
        lambda: moving(made(0.5), 1),
        "Linear: 6 parameters in float32 on cpu; momentum 0.5; 1 update; 50% initial weights",
    ),
    (lambda: ModelAverage(nn.ReLU()), "ReLU: 0 parameters; 0 updates; "),
    (lambda: ModelAverage.__new__(ModelAverage), "<AttributeError>"),  # shows what is broken, and does not raise
]


@pytest.mark.parametrize(("make", "expected"), REPRS)
def test_repr_says_what_is_averaged_and_where_it_stands(make, expected):
    assert repr(make()).startswith(f"ModelAverage({expected}")


def test_the_beginning_of_a_warm_up_is_not_too_small_for_the_type():
    model = constant(1.0)
    average = ModelAverage(model, momentum=schedules.LinearWarmup(0.01, 0.0, 10**7))
    for _ in range(3):
        average.update()


def test_a_twin_of_ones_own_has_not_moved_yet_when_its_type_is_looked_at():
    average = ModelAverage(constant(1.0), ema_model=constant(0.0))
    with pytest.warns(EMAWarning, match="too small for the type"):
        average.update(1e-9)
