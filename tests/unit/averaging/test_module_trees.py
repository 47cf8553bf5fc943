"""Two module trees side by side: by name, and what no longer matches raises and names the path."""

import pytest
import torch
from torch import nn

from ignite_ema import ModelAverage
from tests.helpers.bits import contents, tensors
from tests.helpers.models import frozen, module

# Structures that no longer match.


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.tied = nn.Linear(2, 2)
    model.tied.weight = model[0].weight
    return model


def view_in_another_shape(model):
    model[0].bias.data = model[0].bias.data.view(1, 2)


def layer_added(model):
    model.extra = nn.Linear(2, 2)


def layer_removed(model):
    delattr(model, "2")


def layer_replaced(model):
    model[2] = nn.Linear(2, 3)


def layer_replaced_by_another_kind(model):
    model[2] = nn.LayerNorm(2, bias=False)


def tie_made(model):
    model[2].weight = model[0].weight


def tie_broken(model):
    model.tied.weight = nn.Parameter(model.tied.weight.detach().clone())


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model[2])


def bias_dropped(model):
    model[0].bias = None


def buffer_registered(model):
    model[0].register_buffer("count", torch.zeros(()))


def buffer_dropped(model):
    del model[1].running_mean


def buffer_reshaped(model):
    model[1].running_mean = torch.zeros(3)


CHANGES = {
    view_in_another_shape: r"'0\.bias' has shape \(1, 2\) in the model and \(2,\) in the twin",
    layer_added: r"'extra' is in the model but not in the twin",
    layer_removed: r"'2' is in the twin but not in the model",
    layer_replaced: r"'2\.weight' has shape \(3, 2\) in the model and \(2, 2\) in the twin",
    layer_replaced_by_another_kind: r"'2\.bias' is in the twin but not in the model",
    tie_made: r"'2\.weight' is tied to '0\.weight' in the model but not in the twin",
    tie_broken: r"'tied\.weight' is tied to '0\.weight' in the twin but not in the model",
    parametrised: r"'2\.(weight|parametrizations)' is in the (twin|model) but not in the (model|twin)",
    bias_dropped: r"'0\.bias' is in the twin but not in the model",
    buffer_registered: r"'0\.count' is in the model but not in the twin",
    buffer_dropped: r"'1\.running_mean' is in the twin but not in the model",
    buffer_reshaped: r"'1\.running_mean' has shape \(3,\) in the model and \(2,\) in the twin",
}


@pytest.mark.parametrize("updates_before", [0, 1])
@pytest.mark.parametrize("mode", ["copy", "update"])
@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_changed_structure_raises_each_time_and_leaves_the_average_alone(change, message, mode, updates_before):
    model = two_layers()
    average = ModelAverage(model, mode)
    for _ in range(updates_before):
        average.update(0.5)
    before = contents(average.module)
    for tensor in tensors(model).values():
        tensor.fill_(5)
    change(model)
    for attempt in (lambda: average.update(0.5), lambda: average.update(0.5), average.reset):
        with pytest.raises(RuntimeError, match=rf"keep the structure that it had .*, but {message}; make the change"):
            attempt()
    assert contents(average.module) == before


@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_twin_of_another_structure_raises(change, message):
    model, twin = two_layers(), two_layers()
    change(model)
    before = contents(twin)
    with pytest.raises(RuntimeError, match=rf"ema_model should have the structure of the model, but {message}; build"):
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
    model = two_layers()
    twin = two_layers()
    twin[1] = model[1]
    with pytest.raises(RuntimeError, match="'1' is one and the same module in the model and in the twin"):
        ModelAverage(model, ema_model=twin)
    with pytest.raises(RuntimeError, match="the root is one and the same module"):
        ModelAverage(model, ema_model=model)
