"""Models of users: buffers that come and go, methods of their own, functions that deepcopy does not copy."""

import copy
import functools
import weakref
from dataclasses import dataclass

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from ignite_ema import EMAHandler, EMAWarning, ModelAverage, schedules
from tests.helpers.bits import contents


class Cached(nn.Module):
    """Makes a mask when it first needs one, and a wider one when it needs that."""

    def __init__(self, registered=True):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        if registered:
            self.register_buffer("mask", None, persistent=False)

    def forward(self, x):
        if getattr(self, "mask", None) is None or len(self.mask) < len(x):
            self.register_buffer("mask", torch.full((len(x), 2), 3.0), persistent=False)
        return self.linear(x) * self.mask[: len(x)]


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("buffers", ["copy", "update", "statistics", "ema_train"])
def test_a_buffer_that_a_pass_makes_is_followed(registered, buffers):
    model = Cached(registered)
    average = ModelAverage(model, buffers)
    state = average.state_dict()
    before = average.module.linear.weight.clone()
    for rows in (1, 1 if buffers == "update" else 3):  # what is averaged keeps its shape
        model(torch.ones(rows, 2))
        model.linear.weight.data.add_(1)
        average.update(0.5)
        if buffers != "ema_train":
            assert average.module.mask.equal(model.mask)
            assert average.module.mask is not model.mask
    assert average.module.linear.weight.sub(before).sub(1.25).abs().max() < 1e-6
    if buffers != "update":
        assert state["averaged_tensors"].keys() == average.state_dict()["averaged_tensors"].keys()


def test_a_buffer_that_comes_late_has_the_type_of_the_twin():
    model = Cached().bfloat16()
    average = ModelAverage(model, dtype=torch.float32)
    model(torch.ones(1, 2, dtype=torch.bfloat16))
    model.mask = model.mask.bfloat16()
    average.update(0.5)
    assert average.module.mask.dtype == torch.float32
    assert "mask" in average.module._non_persistent_buffers_set


def test_a_buffer_that_the_model_clears_or_only_the_twin_has_made_is_cleared():
    model = Cached()
    average = ModelAverage(model)
    average.module(torch.ones(2, 2))
    average.update(0.5)
    assert average.module.mask is None
    model(torch.ones(2, 2))
    average.update(0.5)
    model.mask = None
    with average.swapped():
        model(torch.ones(4, 2))
    assert model.mask is None
    assert average.module.mask is None


def test_a_buffer_that_came_with_what_does_not_match_leaves_the_twin_as_it_was():
    model = nn.Sequential(Cached())
    average = ModelAverage(model)
    model[0](torch.ones(1, 2))
    model.append(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"'1\.\w+' is in the model but not in the twin"):
        average.update(0.5)
    assert average.module[0].mask is None


def test_a_buffer_that_cannot_be_copied_leaves_the_twin_as_it_was(monkeypatch):
    model, register = nn.Sequential(Cached(), Cached()), nn.Module.register_buffer
    average = ModelAverage(model)
    model(torch.ones(1, 2))

    def fails_at_the_second(module, *args, **kwargs):
        if module is average.module[1]:
            raise MemoryError
        register(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_buffer", fails_at_the_second)
    with pytest.raises(MemoryError):
        average.update(0.5)
    assert average.module[0].mask is None


def test_a_script_is_swapped_and_comes_back():
    for model in (
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
        torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2)),
        nn.Sequential(torch.jit.script(nn.BatchNorm1d(2)), nn.Linear(2, 2)),
    ):
        average, before = ModelAverage(model), contents(model)
        for tensor in average.module.parameters():
            tensor.fill_(7.0)
        with average.swapped():
            assert all((parameter == 7).all() for parameter in model.parameters())
        assert contents(model) == before
        average.update(1.0)


def test_a_state_dict_or_parameters_of_ones_own_are_left_alone():
    class Own(nn.Linear):
        def state_dict(self):
            return {"weight": self.weight.tolist()}

        def parameters(self):
            return [{"params": [self.weight], "lr": 0.1}, {"params": [self.bias], "lr": 1.0}]

    model = Own(2, 2)
    average = ModelAverage(model)
    model.weight.data.fill_(3.0)
    assert average.update(1.0)
    assert average.module.weight.unique().item() == 3.0
    assert "8 parameters" not in repr(average)
    assert "6 parameters" in repr(average)
    handler, optimizer = EMAHandler(model, 1.0), torch.optim.SGD(model.parameters())
    trainer = Engine(lambda engine, batch: optimizer.step())
    handler.attach(trainer, optimizer=optimizer)
    trainer.run([0] * 2)
    assert handler.num_updates == 2


def test_an_exported_program_has_one_mode():
    exported = torch.export.export(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),)).module()
    average = ModelAverage(exported)
    next(exported.parameters()).data.fill_(3.0)
    assert average.update(1.0)
    assert next(average.module.parameters()).unique().item() == 3.0


@dataclass
class Holder:
    function: object


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def double(self, x):
        return 2 * self.scale * x

    def forward(self, x):
        return self.scale * x


model_of_the_script = Scaled()
forward_of_the_script = model_of_the_script.forward


def uses_the_model_of_the_script(*args):
    return model_of_the_script(args[-1])


def uses_the_forward_of_the_script(x):
    return 2 * forward_of_the_script(x)


def uses_neither(*args):
    return functools.partial(torch.mul, 2)(args[-1].model_of_the_script)


def with_attribute(value, name="kept"):
    model = Scaled()
    setattr(model, name, value(model))
    return model


def with_hook(register, hook):
    model = Scaled()
    getattr(model, register)(hook(model))
    return model


def of_the_script(function):
    model_of_the_script.kept = function
    return model_of_the_script


COMPUTES_ONLINE = {
    "a list": lambda: with_attribute(lambda model: [torch.relu, lambda x: model.scale * x]),
    "a mapping": lambda: with_attribute(lambda model: {"double": (lambda x: model.double(x),)}),
    "a dataclass": lambda: with_attribute(lambda model: Holder(lambda x: model.double(x))),
    "a weak reference": lambda: with_attribute(weakref.ref),
    "a cache": lambda: with_attribute(lambda model: functools.lru_cache(model.double)),
    "a hook": lambda: with_hook("register_forward_hook", lambda model: lambda *_: model.scale),
    "a hook before": lambda: with_hook("register_forward_pre_hook", lambda model: lambda *_: model.scale),
    "a global model": lambda: of_the_script(uses_the_model_of_the_script),
    "a global method": lambda: of_the_script(uses_the_forward_of_the_script),
}
HARMLESS = {
    "methods": lambda: with_attribute(lambda model: [model.double, functools.partial(model.double, 2)]),
    "parts": lambda: with_attribute(lambda model: Holder([model.scale, torch.relu, "text", 1])),
    "a backward hook": lambda: with_hook("register_full_backward_hook", lambda model: lambda *_: model.scale and None),
    "a hook on saving": lambda: with_hook("register_state_dict_pre_hook", lambda model: lambda *_: model.training),
    "a hook on loading": lambda: with_hook("register_load_state_dict_pre_hook", lambda model: lambda *_: None),
    "an attribute of that name": lambda: of_the_script(uses_neither),
    "a method that only moves": lambda: with_attribute(lambda model: lambda *args: model, "to"),  # as Accelerate sets
}


@pytest.mark.parametrize("make", COMPUTES_ONLINE.values(), ids=COMPUTES_ONLINE)
def test_a_function_that_computes_with_the_online_model_is_named(make):
    with pytest.warns(EMAWarning, match="'(kept|forward_hook|forward_pre_hook)' of the model"):
        ModelAverage(make())


@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_what_does_not_compute_in_the_twin_is_not_named(make):
    ModelAverage(make())


def test_a_twin_of_ones_own_that_is_a_copy_is_looked_at_too():
    model = with_attribute(lambda model: lambda x: model.scale * x)
    with pytest.warns(EMAWarning, match="'kept' of the model"):
        ModelAverage(model, ema_model=copy.deepcopy(model))


def test_a_module_of_its_own_modes_may_fill_a_buffer_and_have_types_without_arithmetic():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.narrow = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
            self.register_buffer("fused", torch.zeros(2, 2), persistent=False)

        def train(self, mode=True):
            self.fused = torch.zeros(2, 2) if mode else self.weight.detach() * 2
            return super().train(mode)

    ModelAverage(Own()).update(0.5)


def test_one_cache_of_two_blocks_stays_one_in_the_twin():
    model = nn.ModuleList([Cached(), Cached()])
    average = ModelAverage(model)
    model[0](torch.ones(2, 2))
    model[1].mask = model[0].mask
    average.update(0.5)
    assert average.module[0].mask is average.module[1].mask
    assert average.module[0].mask.equal(model[0].mask)


def test_evaluating_an_embedding_that_renormalises_what_it_reads_is_not_training():
    """torch writes into the weight at each pass, as DistributedDataParallel does at its first."""
    model = nn.Embedding(4, 2, max_norm=100.0)
    with ModelAverage(model).swapped():
        model(torch.arange(4))
        model.weight.data.add_(0)


def test_averages_of_layers_that_are_frozen_now_are_named_as_not_loaded():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    old = ModelAverage(model)
    old.module[0].weight.fill_(7.0)
    model[0].requires_grad_(False)
    new = ModelAverage(model, share_frozen=True)
    with pytest.warns(EMAWarning, match=r"^'0\.weight' started from the model.*frozen and shared"):
        new.load_averaged(old.state_dict(), strict=False)
    assert new.initial_share != new.initial_share  # unknown
    model[1].requires_grad_(False)
    model.append(nn.Linear(1, 1, bias=False))
    newer = ModelAverage(model, share_frozen=True)
    with pytest.warns(EMAWarning, match=r"'2\.weight', '0\.weight' started from the model"):
        newer.load_averaged(old.state_dict(), strict=False)


def test_the_state_dict_of_a_model_with_a_wrapped_block_is_loaded(process_group):
    model = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2)))
    average = ModelAverage(model)
    average.load_averaged({name: torch.full_like(value, 3.0) for name, value in model.state_dict().items()})
    assert {tensor.unique().item() for tensor in average.module.parameters()} == {3.0}


def test_the_beginning_of_a_rescaled_warm_up_is_not_too_small_for_the_type():
    ModelAverage(Scaled(), momentum=schedules.Rescaled(schedules.LinearWarmup(0.01, 1e-9, 100), 2)).update()


def test_a_new_average_takes_from_a_fused_twin_only_what_it_still_has():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(1, 1))
    nn.init.constant_(model[1].weight, 3.0)
    old = ModelAverage(model)
    old.module[2].weight.fill_(7.0)
    old.module[0], old.module[1] = nn.utils.fuse_conv_bn_eval(old.module[0], old.module[1]), nn.Identity()
    with pytest.raises(RuntimeError, match="old.state_dict.., strict=False"):
        old.update(0.5)
    new = ModelAverage(model)
    with pytest.warns(EMAWarning, match=r"^'0\.weight', '0\.bias', '1\.weight'.*started from the model"):
        new.load_averaged(old.state_dict(), strict=False)
    assert torch.equal(new.module[0].weight, model[0].weight)
    assert new.module[2].weight.item() == 7.0
