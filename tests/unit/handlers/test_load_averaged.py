"""Starting an average from a checkpoint: of another system, of none, or of this one."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from ignite_ema import EMAHandler, schedules
from tests.helpers.bits import contents
from tests.helpers.models import Tied, net

AVERAGED = {"ema_model": net(4).state_dict(), "model": net(5).state_dict()}


@pytest.mark.parametrize(("said", "due"), [(None, 3), (7, 7)])
def test_it_starts_from_the_average_and_goes_on_from_its_count_or_what_is_said(said, due, tmp_path):
    average = AveragedModel(net(1))
    for seed in range(3):
        average.update_parameters(net(seed))
    torch.save({"model": net(5).state_dict(), "average": average.state_dict()}, tmp_path / "file.pt")
    handler = EMAHandler(net(), momentum=schedules.EqualWeight())
    handler.load_averaged(tmp_path / "file.pt", num_updates=said)
    assert contents(handler.ema_model) == contents(average.module)
    assert contents(handler.model) == contents(net())
    assert handler.num_updates == due


def test_the_count_stays_where_nobody_says_it_unless_the_schedule_needs_it():
    handler, warming_up = EMAHandler(net()), EMAHandler(net(), schedules.LinearWarmup(0.5, 0.1, 5))
    handler.num_updates = 5
    handler.load_averaged(AVERAGED)
    assert handler.num_updates == 5
    with pytest.raises(ValueError, match="would go on with a momentum of 0.1. Pass num_updates=, 0 to start"):
        warming_up.load_averaged(AVERAGED)
    warming_up.load_averaged(AVERAGED, num_updates=0)
    EMAHandler(net(), 1.0).load_averaged(AVERAGED, num_updates=0)  # hard copies are what is asked for
    assert contents(handler.ema_model) == contents(warming_up.ema_model) == contents(net(4))


def test_a_handler_of_ours_is_read_with_its_ties_and_without_its_non_persistent_buffers():
    first, second = EMAHandler(Tied()), EMAHandler(Tied())
    first.ema_model.first.weight.fill_(5.0)
    first.ema_model.cache.fill_(6.0)
    first.num_updates = 4
    second.load_averaged({"ema_handler": first.state_dict(), "model": first.model.state_dict()})
    assert second.ema_model.second.weight is second.ema_model.first.weight
    assert second.ema_model.second.weight.eq(5).all()
    assert second.ema_model.cache.eq(0).all()
    assert second.num_updates == 4


def test_a_list_without_names_goes_by_the_parameters_of_the_model():
    source, handler = net(4), EMAHandler(net())
    handler.ema_model[1].running_mean.fill_(3.0)
    handler.load_averaged({"shadow_params": list(source.parameters()), "optimization_step": 8})
    assert all(map(torch.equal, handler.ema_model.parameters(), source.parameters()))
    assert handler.ema_model[1].running_mean.eq(3).all()  # diffusers averages no buffers
    assert handler.num_updates == 8


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_names_of_a_wrapped_model_are_taken_out(prefix):
    handler = EMAHandler(net())
    handler.load_averaged({"ema_model": {prefix + name: value for name, value in net(4).state_dict().items()}})
    assert contents(handler.ema_model) == contents(net(4))


def test_a_buffer_of_the_model_is_not_taken_for_the_count():
    model = net()
    model.register_buffer("num_updates", torch.tensor(5))
    handler = EMAHandler(model)
    handler.load_averaged(model.state_dict())
    assert handler.num_updates == 0


def test_what_no_state_holds_is_not_missed_by_a_part():
    model = net()
    model.register_buffer("table", torch.ones(3), persistent=False)
    handler = EMAHandler(model)
    handler.load_averaged(handler.state_dict(), strict=False)
    handler.load_averaged(dict(model.named_parameters()), strict=False)
    assert handler.initial_share == 0
