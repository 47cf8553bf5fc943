"""The state of a ModelAverage is complete; a momentum of its own; how much of the average is still its start."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage, schedules

SCHEDULES = {
    "constant": schedules.Constant(0.25),
    "linear": schedules.LinearWarmup(0.01, 0.5, 7),
    "rescaled": schedules.Rescaled(schedules.Constant(0.1), 3),
    "function": lambda n: 0.5 / (n + 1),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def made(momentum=0.25, **options):
    torch.manual_seed(0)
    return ModelAverage(nn.Linear(2, 2), momentum=momentum, **options)


def moving(average, steps):
    for _ in range(steps):
        for parameter in average.model.parameters():
            parameter.data.add_(1)
        average.update()
    return average


@each_schedule
def test_update_without_a_momentum_follows_the_schedule(schedule):
    by_itself, by_hand, share = moving(made(schedule), 12), made(None), 1.0
    for n in range(12):
        for parameter in by_hand.model.parameters():
            parameter.data.add_(1)
        assert by_hand.update(schedule(by_hand.num_updates))
        share *= 1 - schedule(n)
    assert torch.equal(by_itself.module.weight, by_hand.module.weight)
    assert by_itself.initial_share == by_hand.initial_share == share


@pytest.mark.parametrize("schedule", [schedules.EqualWeight(), schedules.PowerFunction(0.1), schedules.InverseGamma()])
def test_after_a_copy_nothing_is_left_of_the_start(schedule):
    assert moving(made(schedule), 1).initial_share == 0.0


def test_what_counts_as_an_update_and_what_is_left_of_the_start():
    average = made(skip_nonfinite=True)
    assert (average.num_updates, average.initial_share) == (0, 1.0)
    moving(average, 1)
    average.momentum = 0.5
    assert moving(average, 1).momentum == 0.5
    weight, bias = average.model.weight.detach().clone(), average.model.bias
    average.model.weight.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="holds a NaN"):
        average.update()
    average.model.weight.data.copy_(weight)
    average.model.bias = None
    with pytest.raises(RuntimeError, match="should keep the structure"):
        average.update()
    average.model.bias = bias
    average.reset(buffers_only=True)
    assert (average.num_updates, average.num_skipped, average.initial_share) == (2, 1, 0.75 * 0.5)
    average.load_plain(nn.Linear(2, 2).state_dict())  # from elsewhere: not the start
    assert average.initial_share == 0.0
    average.reset()
    assert (average.num_updates, average.initial_share) == (0, 1.0)


def test_a_decay_is_warned_about_at_the_users_line():
    with pytest.warns(UserWarning, match="momentum is the weight of the new weights, and 0.999") as caught:
        ModelAverage(nn.Linear(1, 1), momentum=0.999)
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("stop", [0, 4])
@each_schedule
def test_a_state_restores_weights_counts_and_share_to_the_bit(schedule, stop):
    due = moving(made(schedule), 9)
    first, second, file = moving(made(schedule), stop), made(schedule), io.BytesIO()
    second.model.load_state_dict(first.model.state_dict())
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert second.initial_share == first.initial_share
    moving(second, 9 - stop)
    assert torch.equal(second.module.weight, due.module.weight)
    assert (second.num_updates, second.initial_share) == (due.num_updates, due.initial_share)


def test_a_state_that_goes_on_with_another_schedule_is_warned_about():
    state = made(schedules.EqualWeight()).state_dict()
    with pytest.warns(UserWarning, match=r"saved with EqualWeight\(\) and goes on with Constant\(momentum=0.25\)"):
        made().load_state_dict(state)
    made(None).load_state_dict(state)  # its momentum comes with each update


@pytest.mark.parametrize("schedule", [0.25, schedules.InverseGamma(), schedules.Cosine(0.1, 0.0, 5)], ids=str)
def test_a_count_is_what_files_can_hold(schedule):
    average = made(schedule)
    average.num_updates = 2**63 - 1
    made(schedule).load_state_dict(average.state_dict())


def test_a_twin_whose_memory_was_freed_says_how_to_get_it_back():
    average = made()
    state = copy.deepcopy(average.state_dict())
    average.module.weight.untyped_storage().resize_(0)
    message = r"'weight' has lost its values in the twin .*; give the tensor its values back \(to_empty, then load_stat"
    for use in (lambda: average.load_state_dict(state), average.is_as_made, lambda: average.update(0.5)):
        with pytest.raises(RuntimeError, match=message):
            use()
    average.module.to_empty(device="cpu")
    average.load_state_dict(state)
    assert average.update(0.5)
    assert torch.equal(average.module.weight, average.model.weight)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda average: pickle.loads(pickle.dumps(average))}


@pytest.mark.parametrize("options", [{}, {"share_frozen": True}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_its_own_way_from_the_same_place(way, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    model[0].bias.requires_grad_(False)
    average = moving(ModelAverage(model, "update", momentum=0.25, **options), 3)
    other = WAYS[way](average)
    assert (other.num_updates, other.initial_share) == (3, average.initial_share)
    assert (other.module[0].bias is other.model[0].bias) == bool(options.get("share_frozen"))
    held = average.module[0].weight.clone()
    for one in (average.model, other.model):
        one[0].weight.data.fill_(8)
    other.update()
    assert torch.equal(average.module[0].weight, held)
    average.update()
    assert torch.equal(average.module[0].weight, other.module[0].weight)
    with other.swapped():
        assert torch.equal(other.model[0].weight, other.module[0].weight)
        assert (average.model[0].weight == 8).all()


def two_types():
    return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).bfloat16())


REPRS = [
    (lambda: moving(made(0.5), 1), "Linear: 6 parameters in float32 on cpu; momentum 0.5; 1 update"),
    (
        lambda: ModelAverage(nn.Linear(20, 60), dtype=torch.float64),
        "Linear: 1,260 parameters in float64 on cpu; 0 updates",
    ),
    (
        lambda: ModelAverage(two_types(), momentum=schedules.EqualWeight()),
        "Sequential: 4 parameters in float32 and bfloat16 on cpu; momentum EqualWeight(); 0 updates",
    ),
    (lambda: ModelAverage(nn.ReLU()), "ReLU: 0 parameters; 0 updates"),
]


@pytest.mark.parametrize(("make", "expected"), REPRS)
def test_repr_says_what_is_averaged_and_where_it_stands(make, expected):
    assert repr(make()) == f"ModelAverage({expected})"


def test_repr_shows_what_is_broken_and_never_raises():
    average = made(None)
    del average.module
    assert repr(average) == "ModelAverage(<AttributeError>; 0 updates)"
    assert repr(ModelAverage.__new__(ModelAverage)).startswith("ModelAverage(<AttributeError>")
