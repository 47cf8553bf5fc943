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
    "ratio": schedules.RatioWarmup(0.2, 10),
    "cosine": schedules.Cosine(0.3, 0.0, 9),
    "rescaled": schedules.Rescaled(schedules.Constant(0.1), 3),
    "function": lambda n: 0.5 / (n + 1),
}


def moving(average, steps):
    for _ in range(steps):
        for parameter in average.model.parameters():
            parameter.data.add_(1)
        average.update()
    return average


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_update_without_a_momentum_follows_the_schedule(name):
    schedule = SCHEDULES[name]
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    by_itself, by_hand = ModelAverage(model, momentum=schedule), ModelAverage(model)
    share = 1.0
    for n in range(12):
        model.weight.data.add_(1)
        assert by_itself.update()
        assert by_hand.update(schedule(by_hand.num_updates))
        share *= 1 - schedule(n)
    assert torch.equal(by_itself.module.weight, by_hand.module.weight)
    assert by_itself.initial_share == by_hand.initial_share == share


@pytest.mark.parametrize("schedule", [schedules.EqualWeight(), schedules.PowerFunction(0.1), schedules.InverseGamma()])
def test_after_a_copy_nothing_is_left_of_the_start(schedule):
    assert moving(ModelAverage(nn.Linear(1, 1), momentum=schedule), 1).initial_share == 0.0


def test_the_share_is_one_at_the_start_and_after_reset():
    average = ModelAverage(nn.Linear(1, 1), momentum=0.25)
    assert average.initial_share == 1.0
    assert moving(average, 2).initial_share == 0.75**2
    average.reset(buffers_only=True)
    assert average.initial_share == 0.75**2
    average.reset()
    assert (average.initial_share, average.num_updates) == (1.0, 0)


def test_an_update_that_is_skipped_does_not_count():
    average = ModelAverage(nn.Linear(1, 1), momentum=0.25, skip_nonfinite=True)
    average.model.bias.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="holds a NaN"):
        average.update()
    assert (average.num_updates, average.num_skipped, average.initial_share) == (0, 1, 1.0)


def test_a_refused_update_does_not_count():
    average = ModelAverage(nn.Linear(1, 1), momentum=0.25)
    average.model.bias = None
    with pytest.raises(RuntimeError, match="should keep the structure"):
        average.update()
    assert (average.num_updates, average.initial_share) == (0, 1.0)


def test_an_average_from_elsewhere_is_not_the_start():
    average = ModelAverage(nn.Linear(1, 1), momentum=0.25)
    average.load_plain(nn.Linear(1, 1).state_dict())
    assert average.initial_share == 0.0


def test_the_momentum_may_be_set_between_updates():
    average = moving(ModelAverage(nn.Linear(1, 1), momentum=0.25), 1)
    average.momentum = 0.5
    assert moving(average, 1).initial_share == 0.75 * 0.5
    with pytest.raises(ValueError, match="Invalid momentum: 2"):
        average.momentum = 2
    assert average.momentum == 0.5


def test_update_without_any_momentum_says_where_to_pass_one():
    average = ModelAverage(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"momentum should be a number in \[0, 1\], got None; pass it to update"):
        average.update()
    assert average.num_updates == 0


@pytest.mark.parametrize(
    ("momentum", "error", "message"),
    [
        (0, ValueError, "Invalid momentum: 0"),
        (1.0, ValueError, "Invalid momentum: 1.0"),
        (float("nan"), ValueError, "Invalid momentum: nan"),
        ("x", TypeError, "momentum should be a float in .0, 1. or a schedule, got 'x'"),
        (True, TypeError, "got True"),
        pytest.param(
            10**400, ValueError, "Invalid momentum: an integer of 1329 bits; it should be in .0, 1.", id="huge"
        ),
        (lambda n: 10**5000, ValueError, "the schedule should return .* got an integer of 16610 bits after 0 updates"),
        (schedules.EqualWeight, TypeError, "should be a schedule, got the class EqualWeight; make one"),
        (lambda n: 2, ValueError, "the schedule should return a momentum in"),
    ],
)
def test_what_is_no_momentum_is_refused_when_the_average_is_made(momentum, error, message):
    with pytest.raises(error, match=message):
        ModelAverage(nn.Linear(1, 1), momentum=momentum)


def test_a_decay_is_warned_about_at_the_users_line():
    with pytest.warns(UserWarning, match="momentum is the weight of the new weights, and 0.999") as caught:
        ModelAverage(nn.Linear(1, 1), momentum=0.999)
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_state_restores_weights_counts_and_share_to_the_bit(name, stop):
    def made():
        torch.manual_seed(0)
        return ModelAverage(nn.Linear(2, 2), momentum=SCHEDULES[name])

    due = moving(made(), 9)
    first, second = moving(made(), stop), made()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.initial_share == first.initial_share
    moving(second, 9 - stop)
    assert torch.equal(second.module.weight, due.module.weight)
    assert (second.num_updates, second.initial_share) == (due.num_updates, due.initial_share)


def test_a_state_that_goes_on_with_another_schedule_is_warned_about():
    state = ModelAverage(nn.Linear(1, 1), momentum=schedules.EqualWeight()).state_dict()
    other = ModelAverage(nn.Linear(1, 1), momentum=0.25)
    with pytest.warns(UserWarning, match=r"saved with EqualWeight\(\) and goes on with Constant\(momentum=0.25\)"):
        other.load_state_dict(state)
    ModelAverage(nn.Linear(1, 1)).load_state_dict(state)  # its momentum comes with each update


def replaced(**entries):
    state = {**ModelAverage(nn.Linear(2, 2)).state_dict(), **entries}
    return {key: value for key, value in state.items() if value != "left out"}


BAD_STATES = [
    (None, TypeError, "The state of a ModelAverage should be a mapping from its state_dict.., got NoneType"),
    ({}, ValueError, "but it misses 'ignite_ema_version'"),
    (nn.Linear(2, 2).state_dict(), ValueError, "the state of a model belongs into the averaged twin"),
    ({"average": replaced()}, ValueError, "got a mapping that has one under 'average'; load that entry"),
    (replaced(ignite_ema_version=2), ValueError, "'ignite_ema_version' of the state should be 3, got 2"),
    (replaced(ignite_ema_version=torch.ones(2)), ValueError, "should be 3, got one of type Tensor; load it with"),
    (replaced(ignite_ema_version=3.0), ValueError, "should be 3, got one of type float; load it with"),
    (replaced(ignite_ema_version=10**5000), ValueError, "should be 3, got an integer of 16610 bits; load it with"),
    (replaced(initial_share="left out"), ValueError, "but it misses 'initial_share'"),
    (replaced(num_skipped="left out"), ValueError, "but it misses 'num_skipped'"),
    (replaced(decay=0.9), ValueError, "but it should not have 'decay'"),
    (replaced(initial_share=1.5), ValueError, r"'initial_share' of the state should be in \[0, 1\], got 1.5"),
    (replaced(initial_share=float("nan")), ValueError, r"should be in \[0, 1\], got nan"),
    (replaced(initial_share=1), TypeError, "'initial_share' of the state should be of type float, got int"),
    (replaced(num_updates=-1), ValueError, "'num_updates' of the state should be 0 or more, got -1"),
    (replaced(num_updates=2**63), ValueError, r"'num_updates' of the state should be 2\*\*63 - 1 or less, got 9223372"),
    (replaced(num_updates=10**29), ValueError, r"should be 2\*\*63 - 1 or less, got an integer of 97 bits: it counts"),
    (replaced(num_skipped=10**400), ValueError, "'num_skipped' of the state should be .* got an integer of 1329 bits"),
    (replaced(num_skipped=-(10**5000)), ValueError, "should be 0 or more, got an integer of 16610 bits"),
    (replaced(averaged_tensors={}), ValueError, "the state misses 'weight'"),
    (replaced(averaged_tensors=[]), TypeError, "'averaged_tensors' of the state should be of type Mapping, got list"),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_a_bad_state_raises_and_changes_nothing(state, error, message):
    average = moving(ModelAverage(nn.Linear(2, 2), momentum=0.25), 3)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(error, match=message):
        average.load_state_dict(state)
    after = average.state_dict()
    tensors = after.pop("averaged_tensors"), before.pop("averaged_tensors")
    assert after == before
    assert all(torch.equal(tensors[0][path], tensors[1][path]) for path in tensors[1])


@pytest.mark.parametrize("schedule", [0.25, schedules.InverseGamma(), schedules.Cosine(0.1, 0.0, 5)], ids=str)
def test_a_count_is_what_files_can_hold(schedule):
    average = ModelAverage(nn.Linear(1, 1), momentum=schedule)
    average.num_updates = 2**63 - 1
    for count in (2**63, 10**400, -1):
        with pytest.raises(ValueError, match="^num_updates should be .* it counts updates"):
            average.num_updates = count
    assert average.num_updates == 2**63 - 1
    ModelAverage(nn.Linear(1, 1), momentum=schedule).load_state_dict(average.state_dict())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_not_loaded(layout, is_shared):
    average = ModelAverage(nn.Linear(2, 2).requires_grad_(not is_shared), share_frozen=is_shared)
    tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(2)], layout=layout)
    with pytest.raises(ValueError, match="^'weight' .* should be equal" if is_shared else "^'weight' .* got a nested"):
        average.load_plain({**average.module.state_dict(), "weight": tensor})
    if not is_shared:
        with pytest.raises(ValueError, match="^'weight' of the averaged tensors should have one shape, got a nested"):
            average.load_averaged_tensors({**average.averaged_tensors(), "weight": tensor})


def test_what_has_no_memory_is_neither_loaded_nor_loaded_into():
    average = ModelAverage(nn.Linear(2, 2))
    state = copy.deepcopy(average.state_dict())
    freed = torch.ones(2, 2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="'weight' .* should have values, got one whose memory was freed; load"):
        average.load_state_dict(replaced(averaged_tensors={**state["averaged_tensors"], "weight": freed}))
    average.module.weight.untyped_storage().resize_(0)
    message = (
        r"'weight' has lost its values in the twin .*; give the tensor its values back \(to_empty, then load_state"
    )
    for use in (lambda: average.load_state_dict(state), average.is_as_made, lambda: average.update(0.5)):
        with pytest.raises(RuntimeError, match=message):
            use()
    average.module.to_empty(device="cpu")
    average.load_state_dict(state)
    assert average.update(0.5)
    assert torch.equal(average.module.weight, average.model.weight)


def copies(average):
    return {"deepcopy": copy.deepcopy(average), "pickle": pickle.loads(pickle.dumps(average))}


@pytest.mark.parametrize("options", [{}, {"share_frozen": True}, {"stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_its_own_way_from_the_same_place(way, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    model[0].bias.requires_grad_(False)
    average = moving(ModelAverage(model, "update", momentum=0.25, **options), 3)
    other = copies(average)[way]
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


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (nn.Linear(2, 2), {}, "ModelAverage(Linear: 6 parameters in float32 on cpu; 0 updates)"),
        (
            nn.Linear(20, 60),
            {"momentum": 0.25, "dtype": torch.float64},
            "ModelAverage(Linear: 1,260 parameters in float64 on cpu; momentum 0.25; 0 updates)",
        ),
        (
            nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).bfloat16()),
            {"momentum": schedules.EqualWeight()},
            "ModelAverage(Sequential: 4 parameters in float32 and bfloat16 on cpu; momentum EqualWeight(); 0 updates)",
        ),
        (nn.ReLU(), {}, "ModelAverage(ReLU: 0 parameters; 0 updates)"),
    ],
)
def test_repr_says_what_is_averaged_and_where_it_stands(model, options, expected):
    assert repr(ModelAverage(model, **options)) == expected


def test_repr_counts_updates():
    assert repr(moving(ModelAverage(nn.Linear(1, 1), momentum=0.5), 1)).endswith("; momentum 0.5; 1 update)")


def test_repr_shows_what_is_broken_and_never_raises():
    average = ModelAverage(nn.Linear(1, 1))
    del average.module
    assert repr(average) == "ModelAverage(<AttributeError>; 0 updates)"
    assert repr(ModelAverage.__new__(ModelAverage)).startswith("ModelAverage(<AttributeError>")
