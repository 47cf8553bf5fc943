"""Starting an average from a checkpoint: of another system, of none, or of this one."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ignite_ema import EMAHandler, schedules
from tests.helpers.models import net


def averaged_model(updates=3):
    average = AveragedModel(net(1))
    for seed in range(updates):
        average.update_parameters(net(seed))
    return average


def equal(module, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_it_starts_from_the_average_and_goes_on_from_its_count(tmp_path):
    average = averaged_model()
    torch.save({"model": net(5).state_dict(), "average": average.state_dict()}, tmp_path / "file.pt")
    handler = EMAHandler(net(), momentum=schedules.EqualWeight())
    handler.load_averaged(tmp_path / "file.pt")
    assert equal(handler.ema_model, average.module.state_dict())
    assert handler.num_updates == 3


def test_the_count_can_be_said(tmp_path):
    handler = EMAHandler(net(), momentum=schedules.EqualWeight())
    handler.load_averaged(averaged_model().state_dict(), num_updates=7)
    assert handler.num_updates == 7


def test_the_count_stays_where_nobody_says_it():
    handler = EMAHandler(net())
    handler.num_updates = 5
    handler.load_averaged({"ema_model": net(4).state_dict(), "model": net(5).state_dict()})
    assert equal(handler.ema_model, net(4).state_dict())
    assert handler.num_updates == 5


@pytest.mark.parametrize(
    "schedule", [schedules.EqualWeight(), schedules.ExponentialWarmup(0.001)], ids=["mean", "warm-up"]
)
def test_a_schedule_that_does_not_know_where_to_go_on_is_refused(schedule):
    handler = EMAHandler(net(), momentum=schedule)
    state = {"ema_model": net(4).state_dict(), "model": net(5).state_dict()}
    with pytest.raises(
        ValueError, match=r"num_updates should be .* would go on with a momentum of 0?\.?[19].*num_updates="
    ):
        handler.load_averaged(state)
    assert equal(handler.ema_model, net().state_dict())
    handler.load_averaged(state, num_updates=0)
    assert equal(handler.ema_model, net(4).state_dict())


def test_the_model_is_left_alone():
    handler = EMAHandler(net())
    handler.load_averaged({"ema_model": net(4).state_dict(), "model": net(5).state_dict()})
    assert equal(handler.model, net().state_dict())


def test_a_checkpoint_without_an_average_is_started_from_with_a_warning(tmp_path):
    torch.save({"model": net(4).state_dict(), "epoch": 3}, tmp_path / "file.pt")
    handler = EMAHandler(net())
    with pytest.warns(UserWarning, match="The checkpoint has no average"):
        handler.load_averaged(tmp_path / "file.pt")
    assert equal(handler.ema_model, net(4).state_dict())


def test_a_handler_of_ours_is_read_with_its_ties_and_without_its_non_persistent_buffers():
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].bias = model[0].bias
        model.register_buffer("cache", torch.zeros(2), persistent=False)
        return model

    first, second = EMAHandler(tied()), EMAHandler(tied())
    first.ema_model[0].bias.fill_(5.0)
    first.ema_model.cache.fill_(6.0)
    first.num_updates = 4
    second.load_averaged({"ema_handler": first.state_dict(), "model": first.model.state_dict()})
    assert second.ema_model[1].bias is second.ema_model[0].bias
    assert second.ema_model[1].bias.eq(5).all()
    assert second.ema_model.cache.eq(0).all()
    assert second.num_updates == 4


def test_a_list_without_names_goes_by_the_parameters_of_the_model():
    source = net(4)
    handler = EMAHandler(net())
    handler.ema_model[1].running_mean.fill_(3.0)
    handler.load_averaged({"shadow_params": list(source.parameters()), "optimization_step": 8})
    assert all(map(torch.equal, handler.ema_model.parameters(), source.parameters()))
    assert handler.ema_model[1].running_mean.eq(3).all()  # diffusers averages no buffers
    assert handler.num_updates == 8


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_the_names_of_a_wrapped_model_are_taken_out(prefix):
    handler = EMAHandler(net())
    handler.load_averaged({"ema_model": {prefix + name: value for name, value in net(4).state_dict().items()}})
    assert equal(handler.ema_model, net(4).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"'0\.weight' is missing"),
        (lambda s: s.pop("1.running_var"), r"'1\.running_var' is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "it has no 'extra'"),
        (lambda s: s.update({"0.weight": torch.ones(4, 4)}), r"'0\.weight' .* shape \(4, 3\), got \(4, 4\)"),
        (lambda s: s.update({"0.weight": s["0.weight"].double()}), r"'0\.weight' .* fit into torch\.float32"),
    ],
    ids=["missing parameter", "missing buffer", "unexpected", "shape", "type"],
)
def test_an_average_of_another_model_is_refused_and_nothing_changes(change, message):
    state = net(4).state_dict()
    change(state)
    handler = EMAHandler(net())
    with pytest.raises(ValueError, match=message):
        handler.load_averaged({"ema_model": state}, num_updates=3)
    assert equal(handler.ema_model, net().state_dict())
    assert handler.num_updates == 0


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_a_wrong_count_is_refused(count):
    handler = EMAHandler(net())
    with pytest.raises((TypeError, ValueError), match="num_updates should be"):
        handler.load_averaged({"ema_model": net(4).state_dict()}, num_updates=count)
    assert equal(handler.ema_model, net().state_dict())
