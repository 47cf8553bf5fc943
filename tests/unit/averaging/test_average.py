"""ModelAverage: its momentum, its counts and its repr."""

import math

import pytest
import torch
from torch import nn

from ignite_ema import EMAWarning, ModelAverage, schedules
from tests.helpers.averages import made, moving
from tests.helpers.models import constant


@pytest.mark.parametrize("schedule", [schedules.LinearWarmup(0.01, 0.5, 7), lambda n: 0.5 / (n + 1)])
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
