"""The state of an average is complete, and loads; other weights load as far as they fit."""

import io
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, ModelAverage, schedules
from tests.helpers.averages import made, moving
from tests.helpers.bits import assert_same_bits, bits, contents, copied
from tests.helpers.models import Tied, move

SCHEDULES = {
    "linear": schedules.LinearWarmup(0.01, 0.5, 7),
    "debiased": schedules.Debiased(0.1),
    "function": lambda n: 0.5 / (n + 1),
}
FILES = Path(__file__).parents[2] / "integration" / "files"


# States of an average.


@pytest.mark.parametrize("stop", [0, 4])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_state_restores_weights_counts_and_share_to_the_bit(schedule, stop):
    due = moving(made(schedule), 9)
    first, second, file = moving(made(schedule), stop), made(schedule), io.BytesIO()
    second.model.load_state_dict(first.model.state_dict())
    torch.save(first.state_dict(), file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_same_bits(second.state_dict(), first.state_dict())
    assert_same_bits(moving(second, 9 - stop).state_dict(), due.state_dict())


def state_of_version_4():
    """What ``state_v4.pt`` was written from: ``torch.save(state_of_version_4(), FILES / "state_v4.pt")``."""
    model = Tied(2)
    for index, tensor in enumerate([*model.parameters(), *model.buffers()]):
        tensor.data.fill_(index)
    handler = EMAHandler(model, schedules.InverseGamma(), handle_buffers={"cache": "update", "kept": "keep"})
    handler.average.update(0.5)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.add_(8)
    handler.average.update(0.25)
    return handler.state_dict()


def test_a_stored_state_of_version_4_loads():
    """Later versions of the library have to read it, too: this file is never written again."""
    model = Tied(2)
    handler = EMAHandler(model, schedules.InverseGamma(), handle_buffers={"cache": "update", "kept": "keep"})
    stored = torch.load(FILES / "state_v4.pt", weights_only=True)
    handler.load_state_dict(stored)
    twin = handler.ema_model
    weights = {name: one.flatten()[0].item() for name, one in twin.named_parameters()}
    assert weights == {"first.weight": 2.0, "first.bias": 3.0, "norm.weight": 4.0, "norm.bias": 5.0}
    # averaged, not persistent; kept; copied
    assert (twin.cache[0].item(), twin.kept[0].item(), twin.norm.running_mean[0].item()) == (7.0, 4.0, 14.0)
    assert twin.second.weight is twin.first.weight
    assert (handler.num_updates, handler.initial_share) == (2, 0.375)
    assert handler.average.schedule(handler.num_updates) == pytest.approx(3 ** (-2 / 3))
    assert_same_bits(handler.average.averaged_tensors(), stored["averaged_tensors"])


# Other weights.


@pytest.fixture
def pair():
    """An average, and another model of its kind, whose state can be loaded."""
    average, other = ModelAverage(Tied()), Tied()
    move(average.model)
    move(other)
    average.module.cache.fill_(7.0)
    return average, other


def test_a_plain_state_is_loaded_and_what_it_has_no_place_for_stays(pair):
    average, other = pair
    online = contents(average.model)
    average.load_averaged(other.state_dict())
    due = {**contents(other), "cache": bits(torch.full((2,), 7.0))}
    assert contents(average.module) == due
    assert average.module.second.weight is average.module.first.weight
    assert contents(average.model) == online
    move(other)  # it is not tied to what was loaded
    assert contents(average.module) == due


@pytest.mark.parametrize("left_out", ["first.weight", "second.weight"])
def test_a_tied_weight_may_have_either_name_a_narrower_type_and_a_nan(left_out, pair):
    average, other = pair
    state = copied(other.bfloat16().state_dict())
    state["first.weight"][0, 0] = state["second.weight"][0, 0] = torch.nan
    due = state["first.weight"].float()
    average.load_averaged(state)
    del state[left_out]
    average.load_averaged(state)
    torch.testing.assert_close(average.module.second.weight, due, rtol=0, atol=0, equal_nan=True)


# strict=False: the ways out for another head, and for layers that are trained later.


def headed(classes, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, classes))


@pytest.mark.parametrize("what", ["state_dict", "plain"])
def test_another_head_starts_from_the_model(what):
    old, new = ModelAverage(headed(2)), EMAHandler(headed(5, seed=1))
    move(old.model)
    old.update(0.5)
    source = old.state_dict() if what == "state_dict" else {"ema_model": old.module.state_dict()}
    with pytest.raises(ValueError, match="strict=False"):
        new.load_averaged(source)
    move(new.model)
    with pytest.warns(EMAWarning, match=r"'1\.weight', '1\.bias' started from the model.*2 tensors were loaded"):
        new.load_averaged(source, strict=False, num_updates=3)
    assert contents(new.ema_model[0]) == contents(old.module[0])
    assert contents(new.ema_model[1]) == contents(new.model[1])
    assert new.num_updates == 3
    assert math.isnan(new.initial_share)


def test_the_state_of_untied_weights_is_refused_by_a_tied_model():
    untied, tied = Tied(), Tied()
    untied.second.weight = nn.Parameter(torch.randn_like(untied.second.weight))
    average = ModelAverage(tied)
    before = contents(average.module)
    with pytest.raises(ValueError, match="'second.weight' is tied to 'first.weight'"):
        average.load_state_dict(ModelAverage(untied).state_dict())
    assert contents(average.module) == before
