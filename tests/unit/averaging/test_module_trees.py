"""Two module trees side by side: by name, and what no longer matches raises and names the path."""

import re

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.bits import contents, tensors
from tests.helpers.models import frozen, module


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.tied = nn.Linear(2, 2)
    model.tied.weight = model[0].weight
    return model


# A statement about the model, and what is said of it then.
CHANGES = {
    "model[0].bias.data = model[0].bias.data.view(1, 2)": "'0.bias' has shape (1, 2) in the model and (2,) in the twin",
    "model.extra = nn.Linear(2, 2)": "'extra' is in the model but not in the twin",
    "delattr(model, '2')": "'2' is in the twin but not in the model",
    "model[2] = nn.Linear(2, 3)": "'2.weight' has shape (3, 2) in the model and (2, 2) in the twin",
    "model[2] = nn.LayerNorm(2, bias=False)": "'2.bias' is in the twin but not in the model",
    "model[2].weight = model[0].weight": "'2.weight' is tied to '0.weight' in the model but not in the twin",
    "model.tied.weight = nn.Parameter(torch.ones(2, 2))": "'tied.weight' is tied to '0.weight' in the twin",
    "nn.utils.parametrizations.weight_norm(model[2])": "'2.",  # weight is gone, parametrizations have come
    "model[0].bias = None": "'0.bias' is in the twin but not in the model",
    "model[0].register_buffer('count', torch.zeros(()))": "'0.count' is in the model but not in the twin",
    "del model[1].running_mean": "'1.running_mean' is in the twin but not in the model",
    "model[1].running_mean = torch.zeros(3)": "'1.running_mean' has shape (3,) in the model and (2,) in the twin",
}
each_change = pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=CHANGES)


@pytest.mark.parametrize("mode", ["copy", "update"])
@each_change
def test_a_changed_structure_raises_each_time_and_leaves_the_average_alone(change, message, mode):
    model = two_layers()
    average = ModelAverage(model, mode)
    if mode == "update":
        average.update(0.5)
    before = contents(average.module)
    for tensor in tensors(model).values():
        tensor.fill_(5)
    exec(change)
    for attempt in (
        lambda: average.update(0.5),
        lambda: average.update(0.5),
        average.reset,
        average.swapped().__enter__,
    ):
        with pytest.raises(
            RuntimeError, match=f"keep the structure that it had .*, but {re.escape(message)}.*; make the change"
        ):
            attempt()
    assert contents(average.module) == before


@each_change
def test_a_twin_of_another_structure_raises(change, message):
    model, twin = two_layers(), two_layers()
    exec(change)
    before = contents(twin)
    with pytest.raises(
        RuntimeError, match=f"ema_model should have the structure of the model, but {re.escape(message)}.*; build"
    ):
        ModelAverage(model, ema_model=twin)
    assert contents(twin) == before


def test_a_twin_is_paired_by_name_and_not_by_position():
    def weights(*names):
        return nn.ModuleDict({name: module(**{name: frozen(torch.zeros(1)) for name in names}) for name in names})

    model, twin = weights("a", "b", "c"), weights("c", "a", "b")
    average = ModelAverage(model, ema_model=twin)
    for value, weight in enumerate(model.parameters()):
        weight.fill_(value)
    average.update(0.5)
    assert {name: tensor / 2 for name, tensor in tensors(model).items()} == tensors(twin)


@pytest.mark.parametrize("mode", ["copy", "ema_train"])
def test_a_twin_of_ones_own_is_filled_and_put_into_its_mode(mode):
    torch.manual_seed(0)
    model, twin = two_layers(), two_layers()
    assert contents(twin) != contents(model)
    average = ModelAverage(model, mode, ema_model=twin)
    assert average.module is twin
    assert contents(twin) == contents(model)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {part.training for part in twin.modules()} == {mode == "ema_train"}


def test_a_structure_that_is_restored_goes_on():
    model = two_layers()
    average = ModelAverage(model)
    average.update(0.5)
    layer, model[2] = model[2], nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match=r"'2\.weight' has shape"):
        average.update(0.5)
    model[2] = layer
    nn.init.zeros_(average.module[2].bias)
    nn.init.ones_(layer.bias)
    average.update(0.5)
    assert average.module[2].bias.tolist() == [0.5, 0.5]


def test_a_module_that_both_would_own_raises():
    model, twin = two_layers(), two_layers()
    twin[1] = model[1]
    with pytest.raises(RuntimeError, match="'1' is one and the same module in the model and in the twin"):
        ModelAverage(model, ema_model=twin)


@pytest.mark.parametrize("change", ["model.flag = None", "del model.flag; model.register_buffer('other', zero)"])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_buffer_that_is_kept_and_gone_is_noticed(change, flatten):
    zero = torch.zeros(1)
    model = module(flag=zero, weight=nn.Parameter(torch.ones(2)))
    average = ModelAverage(model, {"flag": "keep"}, flatten=flatten)
    exec(change, {"model": model, "zero": zero})
    for attempt in (lambda: average.update(0.5), average.reset, average.swapped().__enter__):
        with pytest.raises(RuntimeError, match="keep the structure that it had .*, but '(flag|other)' is in the"):
            attempt()
